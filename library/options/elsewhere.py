"""Flags of other programs that mean something here too: what to write in their place.

They are not declared as `refused` ones are, because they are not sd-scripts'. Who brings one is told the way
out, where the nearest spelling would only lead astray. Names are without dashes.
"""

from __future__ import annotations

from collections.abc import Mapping

_OF_LUMINA = "a flag of Lumina's scripts"
_CAPTIONS = f"{_OF_LUMINA}; name Kandinsky's with --text_encoder_qwen and --text_encoder_clip"
_NO_SYSTEM_PROMPT = f"{_OF_LUMINA}; Kandinsky's template is always the official one; leave it out"
# Lumina's flags, to the scripts of Kandinsky.
LUMINA: Mapping[str, str] = {
    "gemma2": _CAPTIONS,
    "gemma2_path": _CAPTIONS,
    "gemma2_tokenizer": f"{_OF_LUMINA}; use --qwen_tokenizer and --clip_tokenizer",
    "gemma2_max_token_length": f"{_OF_LUMINA}; use --qwen_max_token_length",
    "gemma2_dtype": f"{_OF_LUMINA}; use --text_encoder_dtype",
    "ae_path": f"{_OF_LUMINA}; use --vae",
    "ae_dtype": f"{_OF_LUMINA}; use --vae_dtype",
    "system_prompt": _NO_SYSTEM_PROMPT,
    "add_system_prompt_to_negative_prompt": _NO_SYSTEM_PROMPT,
}

_OF_KANDINSKY = "it is a flag of Kandinsky's scripts (kandinsky5_...py), and this one is Lumina's"
_PLAIN_NAME = "use --pretrained_model_name_or_path"
# Kandinsky's flags, to the scripts of Lumina.
KANDINSKY5: Mapping[str, str] = {"dit": _PLAIN_NAME} | dict.fromkeys(
    (
        *("text_encoder_qwen", "text_encoder_clip", "qwen_tokenizer", "clip_tokenizer"),
        *("qwen_max_token_length", "edit_prompt_crop", "stream_text_encoder", "task", "image"),
        *("scheduler_scale", "source_dropout_rate"),
    ),
    _OF_KANDINSKY,
)

_SEEN = "which model it is, is read off its file; leave it out"
_TOML = "pictures are described in a TOML that --dataset_config names (docs/datasets.md)"
_TEXT_QUANT = "use --text_encoder_quant"
_GROUP_OFFLOAD = "use --blocks_to_swap N, with --use_pinned_memory_for_block_swap"
_PROMPT_LINE = "sample pictures are described by the lines of --sample_prompts (docs/watching.md)"
_ROUTES = "write each route as --tread_routes start:end:selection_ratio, such as 2:-2:0.5"
_PERIOD = "use --sample_every_n_steps or --sample_every_n_epochs"
_AUTO_SHIFT = "use --timestep_sampling nextdit_shift or flux_shift (docs/noise_and_loss.md)"
_UPLOADED = "every saved file is uploaded once --huggingface_repo_id names a repository; leave it out"
# SimpleTuner's flags and keys of its config.json, to training scripts.
SIMPLETUNER: Mapping[str, str] = {
    "model_family": _SEEN,
    "model_flavour": _SEEN,
    "optimizer": "use --optimizer_type",
    "num_train_epochs": "use --max_train_epochs",
    "flow_schedule_shift": "use --discrete_flow_shift, and for Kandinsky's sample pictures --scheduler_scale",
    "flow_schedule_auto_shift": _AUTO_SHIFT,
    "flow_sigmoid_scale": "use --sigmoid_scale",
    "base_model_default_dtype": "use --mixed_precision",
    **{f"text_encoder_{number}_precision": _TEXT_QUANT for number in range(1, 5)},
    "enable_group_offload": _GROUP_OFFLOAD,
    "enable_model_cpu_offload": _GROUP_OFFLOAD,
    "group_offload_type": _GROUP_OFFLOAD,
    "group_offload_blocks_per_group": _GROUP_OFFLOAD,
    "group_offload_use_stream": _GROUP_OFFLOAD,
    "group_offload_to_disk_path": _GROUP_OFFLOAD,
    "offload_during_startup": "encoders always come one after the other; leave it out",
    "data_backend_config": _TOML,
    "instance_data_dir": _TOML,
    "disable_bucket_pruning": "no picture is left out because its bucket has few of them; leave it out",
    "caption_dropout_probability": "use caption_dropout_rate of the dataset's TOML",
    "checkpointing_steps": "use --save_every_n_steps",
    "checkpoint_step_interval": "use --save_every_n_steps",
    "checkpoints_total_limit": "use --save_last_n_steps",
    "resume_from_checkpoint": "use --resume",
    "use_ema": "use --ema",
    "report_to": "use --log_with",
    "tracker_project_name": "use --log_tracker_name",
    "tracker_run_name": "use --wandb_run_name",
    "hub_model_id": "use --huggingface_repo_id",
    "push_to_hub": _UPLOADED,
    "push_checkpoints_to_hub": _UPLOADED,
    "quantize_via": "use --quantize_device",
    "tread_config": _ROUTES,
    "routes": _ROUTES,  # what tread_config holds, and a config file's tables are flattened
    "user_prompt_library": "use --sample_prompts",
    "validation_prompt": _PROMPT_LINE,
    "validation_negative_prompt": _PROMPT_LINE,
    "validation_guidance": _PROMPT_LINE,
    "validation_resolution": _PROMPT_LINE,
    "validation_num_inference_steps": _PROMPT_LINE,
    "validation_prompt_library": "no prompts are built in; write your own into a file for --sample_prompts",
    "validation_disable_unconditional": "nothing is drawn from an empty prompt unasked; leave it out",
    "validation_guidance_rescale": (
        "the guidance of sample pictures is not rescaled, nor is it there with these models; leave it out"
    ),
    "validation_steps": _PERIOD,
    "validation_step_interval": _PERIOD,
    "validation_epoch_interval": _PERIOD,
    "eval_steps_interval": "use --validate_every_n_steps",
    "eval_epoch_interval": "use --validate_every_n_epochs",
    "evaluation_type": (
        "pictures are not scored; the loss of held-out pictures is measured (docs/watching.md); leave it out"
    ),
}

_MODULE = "use --network_module and --network_args (docs/lora.md, docs/lycoris.md)"
# Those of a LoRA, to the scripts that train one.
SIMPLETUNER_LORA: Mapping[str, str] = {
    "model_type": f"{_MODULE}; a whole model is trained by the ..._train.py scripts (docs/finetuning.md)",
    "lora_type": _MODULE,
    "lycoris_config": _MODULE,
    "lora_rank": "use --network_dim",
    "lora_alpha": "use --network_alpha",
    "lora_dropout": "use --network_dropout",
    "init_lora": "use --network_weights",
    "base_model_precision": "use --base_quant",
}

_OF_LORA = (
    "it is about LoRAs, which the ..._train_network.py scripts train; this one trains the model itself; "
    "leave it out"
)
# The same flags, to the scripts that train whole models.
SIMPLETUNER_WHOLE: Mapping[str, str] = dict.fromkeys(
    ("lora_type", "lycoris_config", "lora_rank", "lora_alpha", "lora_dropout", "init_lora"), _OF_LORA
) | {
    "model_type": "this script trains the model itself (full), and ..._train_network.py a LoRA; leave it out",
    "base_model_precision": "weights that are trained cannot be quantised; leave it out",
}

# Flags of our own that one kind of script has and the other has not.
OF_NETWORKS: Mapping[str, str] = dict.fromkeys(
    (
        *("network_module", "network_dim", "network_alpha", "network_dropout", "network_args"),
        *("network_weights", "dim_from_weights", "scale_weight_norms", "network_train_unet_only"),
        *("network_train_text_encoder", "network_train_text_encoder_only", "text_encoder_lr"),
    ),
    _OF_LORA,
)
_OF_WHOLE = (
    "it is about whole models, which the ..._train.py scripts train; this one trains a LoRA; leave it out"
)
OF_WHOLE_MODELS: Mapping[str, str] = dict.fromkeys(
    ("blockwise_fused_optimizers", "fused_optimizer_groups", "mem_eff_save", "use_safetensors"), _OF_WHOLE
)
