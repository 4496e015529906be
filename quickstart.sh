#!/usr/bin/env bash
# One command from a fresh checkout to a trained LoRA: environment, nano models, training, pictures, report.
# The models are tiny random stand-ins in the real file formats; the programs and flags are the real ones.
set -euo pipefail
cd "$(dirname "$0")"
source tools/environment.sh
prepare_environment requirements.txt

out=output/quickstart
models=$out/models
system_prompt="You are an assistant designed to generate high-quality images based on user prompts."
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 # nano models are fastest with one thread

[ -f "$models/lumina.safetensors" ] && [ -f "$models/gemma2.safetensors" ] && [ -f "$models/ae.safetensors" ] ||
  .venv/bin/python tools/make_nano_models.py --output_dir "$models"

echo "Training a LoRA on examples/photos ..."
.venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
  --num_cpu_threads_per_process 1 lumina_train_network.py \
  --pretrained_model_name_or_path="$models/lumina.safetensors" \
  --gemma2="$models/gemma2.safetensors" \
  --ae="$models/ae.safetensors" \
  --dataset_config="dataset_configs/quickstart.toml" \
  --output_dir="$out" \
  --output_name="photos_lora" \
  --save_model_as=safetensors \
  --network_module=networks.lora_lumina \
  --network_dim=64 \
  --network_alpha=64 \
  --network_args "embedder_dims=[64,64,64]" \
  --learning_rate=2e-3 \
  --optimizer_type="AdamW" \
  --lr_scheduler="cosine" \
  --timestep_sampling="nextdit_shift" \
  --discrete_flow_shift=6.0 \
  --model_prediction_type="raw" \
  --system_prompt="$system_prompt" \
  --max_train_epochs=5 \
  --save_every_n_epochs=2 \
  --mixed_precision="bf16" \
  --gradient_checkpointing \
  --cache_latents_to_disk \
  --cache_text_encoder_outputs_to_disk \
  --seed=1

draw() { # draw FOLDER [more flags]: the same prompts and seeds every time
  local folder=$1
  shift
  rm -rf "$folder"
  .venv/bin/python lumina_minimal_inference.py \
    --pretrained_model_name_or_path "$models/lumina.safetensors" \
    --gemma2_path "$models/gemma2.safetensors" \
    --ae_path "$models/ae.safetensors" \
    --output_dir "$folder" --system_prompt "$system_prompt" \
    --from_file examples/quickstart_prompts.txt --offload "$@"
}
echo "Drawing without and with the LoRA ..."
draw "$out/before"
draw "$out/after" --lora_weights "$out/photos_lora.safetensors;1.0"

.venv/bin/python tools/quickstart_report.py --output_dir "$out"
