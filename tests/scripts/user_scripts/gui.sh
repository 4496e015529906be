# As kohya_ss writes command lines: every field of its form, whether it means something to the model or not.
accelerate launch --num_cpu_threads_per_process=2 "./lumina_train_network.py" --bucket_no_upscale \
  --bucket_reso_steps=64 --cache_latents --cache_latents_to_disk --caption_extension=".txt" --clip_skip=1 \
  --dynamo_backend="no" --enable_bucket --min_bucket_reso=64 --max_bucket_reso=2048 --gradient_checkpointing \
  --huber_c=0.1 --huber_schedule="snr" --learning_rate="0.0001" --loss_type="l2" --lr_scheduler="cosine" \
  --lr_scheduler_num_cycles="10" --lr_scheduler_power="1" --lr_warmup_steps="2" \
  --max_data_loader_n_workers="0" --max_grad_norm="1" --max_timestep="1000" --max_token_length=75 \
  --max_train_steps="6" --mem_eff_attn --mixed_precision="bf16" --multires_noise_discount="0.2" \
  --multires_noise_iterations="0" --network_alpha="8" --network_dim=16 --network_dropout="0" \
  --network_module=networks.lora_lumina --network_train_unet_only --no_half_vae --noise_offset=0.0 \
  --optimizer_type="AdamW8bit" --output_dir="output" --output_name="last" \
  --pretrained_model_name_or_path="lumina-image-2.safetensors" --gemma2="gemma-2-2b.safetensors" \
  --ae="ae.safetensors" --prior_loss_weight=1 --resolution="64,64" --sample_prompts="prompts.txt" \
  --sample_sampler="euler_a" --save_every_n_epochs="1" --save_every_n_steps="4" --save_last_n_steps="10" \
  --save_last_n_steps_state="10" --save_model_as=safetensors --save_precision="fp16" --seed="1234" \
  --text_encoder_lr=5e-05 --train_batch_size="2" --train_data_dir="img" --unet_lr=0.0001 --vae_batch_size="4" \
  --wandb_run_name="last" --log_tracker_name="lumina" --xformers --scale_weight_norms=0
