# After a thread about Lumina in sd-scripts: words that came along from scripts for other models.
accelerate launch --mixed_precision bf16 --num_cpu_threads_per_process 1 lumina_train_network.py \
  --pretrained_model_name_or_path lumina-image-2.safetensors --ae ae.safetensors --gemma2 gemma-2-2b.safetensors \
  --cache_latents_to_disk --save_model_as safetensors --xformers --persistent_data_loader_workers \
  --max_data_loader_n_workers 4 --seed 42 --gradient_checkpointing --mixed_precision bf16 --save_precision bf16 \
  --resolution 64,64 --network_module networks.lora_lumina --network_dim 8 --optimizer_type Adamw8bit \
  --learning_rate 1e-3 --cache_text_encoder_outputs --cache_text_encoder_outputs_to_disk --highvram \
  --sample_sampler euler --output_dir output --timestep_sampling sigmoid --model_prediction_type raw \
  --loss_type l2 --train_batch_size 8 --network_alpha 8 --caption_extension txt --max_train_epochs 3 \
  --network_train_unet_only --save_every_n_epochs 1 --output_name thread --train_data_dir img \
  --min_snr_gamma 5.0 --optimizer_args weight_decay=0.0 \
  --system_prompt "You are an assistant designed to generate high-quality images. <Prompt Start>"
