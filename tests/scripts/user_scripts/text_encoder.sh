# The text encoder is trained too; two rates, as in scripts for models with two of them.
accelerate launch --num_cpu_threads_per_process 1 lumina_train_network.py \
  --pretrained_model_name_or_path lumina-image-2.safetensors --gemma2 gemma-2-2b.safetensors --ae ae.safetensors \
  --dataset_config my_lumina_dataset_config.toml --output_dir output --output_name both \
  --network_module networks.lora_lumina --network_dim 4 --network_alpha 4 --unet_lr 1e-3 \
  --text_encoder_lr 1e-4 1e-4 --optimizer_type Lion --lr_scheduler polynomial --lr_scheduler_power 2 \
  --lr_warmup_steps 1 --max_train_steps 2 --mixed_precision bf16 --gradient_checkpointing --cache_latents \
  --timestep_sampling sigma --weighting_scheme mode --mode_scale 1.2 --debug_dataset
