# A character with Prodigy and regularisation pictures in folders, as guides on Civitai have it.
accelerate launch --num_cpu_threads_per_process 8 lumina_train_network.py \
  --pretrained_model_name_or_path=lumina-image-2.safetensors --gemma2=gemma-2-2b.safetensors --ae=ae.safetensors \
  --train_data_dir="img" --reg_data_dir="reg" --output_dir="output" --output_name="sks_v1" \
  --caption_extension=.txt --shuffle_caption --keep_tokens=1 --caption_separator="," --flip_aug \
  --caption_dropout_rate=0.05 --caption_tag_dropout_rate=0.1 --enable_bucket --resolution=64 \
  --min_bucket_reso=64 --max_bucket_reso=128 --bucket_reso_steps=64 --train_batch_size=2 \
  --network_module=networks.lora_lumina --network_dim=16 --network_alpha=16 --network_train_unet_only \
  --optimizer_type=Prodigy --optimizer_args decouple=True weight_decay=0.01 d_coef=2 \
  use_bias_correction=True safeguard_warmup=True betas=0.9,0.99 \
  --learning_rate=1.0 --unet_lr=1.0 --text_encoder_lr=1.0 --lr_scheduler=cosine --lr_scheduler_num_cycles=1 \
  --max_train_steps=4 --save_every_n_steps=2 --save_last_n_steps=4 --save_state --gradient_accumulation_steps=2 \
  --mixed_precision=bf16 --save_precision=fp16 --gradient_checkpointing --cpu_offload_checkpointing \
  --cache_latents --seed=1026 --prior_loss_weight=0.8 --max_data_loader_n_workers=1 \
  --timestep_sampling=sigmoid --sigmoid_scale=1.2 --discrete_flow_shift=3 --weighting_scheme=logit_normal \
  --logit_mean=0 --logit_std=1 --loss_type=smooth_l1 --huber_schedule=snr --huber_c=0.15
