# A style on anime pictures, as threads about Neta Lumina show it.
export HF_HOME=./hf
accelerate launch --mixed_precision bf16 --num_processes 1 --num_machines 1 --dynamo_backend no \
  --num_cpu_threads_per_process 2 lumina_train_network.py \
  --pretrained_model_name_or_path lumina-image-2.safetensors --gemma2 gemma-2-2b.safetensors --ae ae.safetensors \
  --dataset_config my_lumina_dataset_config.toml --output_dir output --output_name neta_style \
  --network_module networks.lora_lumina --network_dim 32 --network_alpha 16 \
  --network_args "attn_dim=16" "mlp_dim=16" "mod_dim=4" "refiner_dim=8" "embedder_dims=[4,4,4]" \
  --network_train_unet_only --optimizer_type adamw8bit --learning_rate 5e-4 \
  --lr_scheduler cosine_with_restarts --lr_scheduler_num_cycles 2 --lr_warmup_steps 0.1 \
  --timestep_sampling nextdit_shift --discrete_flow_shift 6 --model_prediction_type raw --sigmoid_scale 1.0 \
  --weighting_scheme none --loss_type l2 --gemma2_max_token_length 256 \
  --system_prompt "You are an assistant designed to generate anime images based on textual prompts." \
  --max_train_epochs 2 --save_every_n_epochs 1 --save_last_n_epochs 3 --save_precision bf16 \
  --save_model_as safetensors --mixed_precision bf16 --full_bf16 --gradient_checkpointing --sdpa \
  --cache_latents_to_disk --vae_batch_size 2 --cache_text_encoder_outputs_to_disk --text_encoder_batch_size 4 \
  --skip_cache_check --persistent_data_loader_workers --max_data_loader_n_workers 2 --highvram --lowram \
  --sample_prompts prompts.txt --sample_every_n_epochs 1 --sample_at_first --sample_batch_size 2 \
  --logging_dir logs --log_with tensorboard --log_prefix neta_ --log_config --seed 42 \
  --validation_split 0.25 --validation_seed 9 --validate_every_n_epochs 1 --max_validation_steps 4
