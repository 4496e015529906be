#!/usr/bin/env bash
# One command from a fresh checkout to a trained LoRA: environment, nano models, training, pictures, report.
#
#     ./quickstart.sh               Lumina Image 2.0, into output/quickstart/
#     ./quickstart.sh kandinsky5    Kandinsky 5.0 Image, into output/quickstart-kandinsky5/
#
# The models are tiny random stand-ins in the real file formats; the programs and flags are the real ones.
set -euo pipefail
cd "$(dirname "$0")"
source tools/environment.sh

family=${1:-lumina}
case $family in
lumina) out=output/quickstart ;;
kandinsky5) out=output/quickstart-kandinsky5 ;;
*)
  echo "error: there is no quickstart '$family'; there are lumina and kandinsky5." >&2
  exit 2
  ;;
esac
models=$out/models
prepare_environment requirements.txt
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 # nano models are fastest with one thread

# What is a family's own: its files, how its text encoders are named, and the recipe of its training.
if [ "$family" = lumina ]; then
  train=lumina_train_network.py
  draw=lumina_minimal_inference.py
  dit=$models/lumina.safetensors
  system_prompt="You are an assistant designed to generate high-quality images based on user prompts."
  encoders=(--gemma2 "$models/gemma2.safetensors" --ae "$models/ae.safetensors")
  drawing_encoders=(--gemma2_path "$models/gemma2.safetensors" --ae_path "$models/ae.safetensors")
  own=(--system_prompt "$system_prompt")
  recipe=(
    --network_module networks.lora_lumina --network_args "embedder_dims=[64,64,64]"
    --timestep_sampling nextdit_shift --discrete_flow_shift 6.0 --model_prediction_type raw
  )
else
  train=kandinsky5_train_network.py
  draw=kandinsky5_minimal_inference.py
  dit=$models/kandinsky5lite_t2i.safetensors
  encoders=(
    --text_encoder_qwen "$models/qwen2_5_vl" --text_encoder_clip "$models/clip_l" --vae "$models/ae.safetensors"
  )
  drawing_encoders=("${encoders[@]}")
  own=()
  recipe=(
    --network_module networks.lora_kandinsky5 --network_args "embedder_dims=[64,64,64,64]" mod_dim=16
    --timestep_sampling shift --discrete_flow_shift 3.0
  )
fi

[ -f "$dit" ] || .venv/bin/python tools/make_nano_models.py --family "$family" --output_dir "$models"

echo "Training a LoRA on examples/photos ..."
.venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
  --num_cpu_threads_per_process 1 "$train" \
  --pretrained_model_name_or_path="$dit" \
  "${encoders[@]}" \
  --dataset_config="dataset_configs/quickstart.toml" \
  --cache_directory="$out/cache" \
  --output_dir="$out" \
  --output_name="photos_lora" \
  --save_model_as=safetensors \
  --network_dim=64 \
  --network_alpha=64 \
  --learning_rate=2e-3 \
  --optimizer_type="AdamW" \
  --lr_scheduler="cosine" \
  "${recipe[@]}" \
  "${own[@]}" \
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
  .venv/bin/python "$draw" \
    --pretrained_model_name_or_path "$dit" \
    "${drawing_encoders[@]}" \
    --output_dir "$folder" "${own[@]}" \
    --from_file examples/quickstart_prompts.txt --offload "$@"
}
echo "Drawing without and with the LoRA ..."
draw "$out/before"
draw "$out/after" --lora_weights "$out/photos_lora.safetensors;1.0"

.venv/bin/python tools/quickstart_report.py --output_dir "$out"
