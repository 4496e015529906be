# Two evenings: a state is saved at the end of the first one, and the second goes on from it.
COMMON="--pretrained_model_name_or_path lumina-image-2.safetensors --gemma2 gemma-2-2b.safetensors \
  --ae ae.safetensors --dataset_config my_lumina_dataset_config.toml --output_dir output --output_name evening \
  --network_module networks.lora_lumina --network_dim 8 --network_alpha 4 --network_train_unet_only \
  --optimizer_type AdamW --optimizer_args weight_decay=0.1 betas=(0.9,0.99) --learning_rate 1e-3 \
  --lr_scheduler constant --mixed_precision no --cache_text_encoder_outputs --cache_latents --seed 5 \
  --timestep_sampling shift --discrete_flow_shift 3.1582 --gradient_accumulation_steps 2 --save_every_n_epochs 1 \
  --save_last_n_epochs 2 --save_last_n_epochs_state 1 --save_state --ddp_timeout 60"
accelerate launch --num_cpu_threads_per_process 1 lumina_train_network.py $COMMON --max_train_epochs 2
accelerate launch --num_cpu_threads_per_process 1 lumina_train_network.py $COMMON --max_train_epochs 4 \
  --resume output/evening-state --skip_until_initial_step
