# Little memory: Adafactor with a fixed rate, everything cached on disk, one file of captions for all pictures.
accelerate launch --num_cpu_threads_per_process 1 lumina_train_network.py \
  --pretrained_model_name_or_path lumina-image-2.safetensors --gemma2 gemma-2-2b.safetensors --ae ae.safetensors \
  --in_json meta.json --train_data_dir pictures --dataset_repeats 1 --resolution 64,64 --enable_bucket \
  --min_bucket_reso 64 --bucket_reso_steps 64 --bucket_no_upscale --resize_interpolation area \
  --output_dir output --output_name low_vram --network_module networks.lora_lumina --network_dim 4 \
  --network_alpha 1 --scale_weight_norms 1.0 --network_dropout 0.1 --network_args rank_dropout=0.1 \
  module_dropout=0.1 loraplus_lr_ratio=4 train_blocks=transformer --network_train_unet_only \
  --optimizer_type Adafactor --optimizer_args relative_step=False scale_parameter=False warmup_init=False \
  --learning_rate 1e-3 --lr_scheduler constant_with_warmup --lr_warmup_steps 10% --max_grad_norm 0.0 \
  --max_train_epochs 2 --save_n_epoch_ratio 2 --mixed_precision bf16 --gradient_checkpointing \
  --cache_latents --cache_latents_to_disk --cache_text_encoder_outputs --cache_text_encoder_outputs_to_disk \
  --enable_wildcard --caption_prefix "a photograph," --caption_suffix "on film" \
  --noise_offset 0.05 --ip_noise_gamma 0.1 --ip_noise_gamma_random_strength --min_timestep 50 --max_timestep 950 \
  --loss_type huber --huber_schedule exponential --sample_every_n_steps 5 --sample_prompts prompts.toml \
  --metadata_title "Low VRAM" --metadata_author me --metadata_description "cups, cats" \
  --metadata_license CC0-1.0 --metadata_tags photo,film --metadata_usage_hint "weight 0.8" \
  --metadata_trigger_phrase "on film" --metadata_merged_from nothing --metadata_preprocessor none \
  --metadata_is_negative_embedding false --training_comment "8 GB card" --seed 0 --lowram
