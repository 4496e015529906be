"""What must be the same when a run is resumed, and what may change. Torch-free.

Every flag has its place in one of these tables, which a test checks: what the saved tensors or the promise of
the run hang on must stay; what has no part in the numbers of training may change silently; all else may
change from here on, and a line says so. A flag that is in none of them counts as one of the latter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType

from library.core.checkpoint_files import open_checkpoint
from library.core.errors import ConfigError
from library.core.hashing import HashLedger, sha256_text
from library.data.images import drawn_source
from library.data.items import Item, Manifest
from library.options.train import TrainOptions
from library.options.trainee import TraineeOptions
from library.training.family import ModelFiles
from library.training.state.checkpoint import SavedState

# The trained tensors and the optimizer's have the shapes, meanings and start values that these gave them.
MUST_STAY = {
    "network_module": "the state holds the weights of this kind of network",
    "network_dim": "the state holds weights of this rank",
    "network_alpha": "the weights were trained at this strength",
    "network_args": "the state holds weights of these layers and ranks",
    "dim_from_weights": "the state holds weights of the ranks that this led to",
    "network_train_text_encoder": "the state holds the weights of what was trained",
    "network_train_text_encoder_only": "the state holds the weights of what was trained",
    "base_weights": "the weights were trained on the model with these merged in",
    "optimizer_type": "the state holds what this optimizer remembers",
    "full_bf16": "the state holds weights of this precision",
}
# May be left out from here on, but not begun with.
CANNOT_BEGIN = {"ema": "the state has no running average to go on with"}
# May change, and it is told.
TOLD = {
    *("network_dropout", "scale_weight_norms", "text_encoder_lr"),
    "fused_backward_pass",  # with it every weight's gradient is clipped by itself
    *("max_train_steps", "max_train_epochs", "mixed_precision", "gradient_checkpointing"),
    *("cpu_offload_checkpointing", "gradient_accumulation_steps", "prior_loss_weight"),
    *("max_batch_tokens", "fused_kernels"),
    *("checkpoint_mode", "checkpoint_every_n_blocks", "torch_compile", "dynamo_backend"),
    *("activation_memory_budget", "attn_mode", "base_quant", "quant_matmul", "text_encoder_quant"),
    *("cache_latents", "cache_text_encoder_outputs", "cache_dtype", "max_caption_variants"),
    *("optimizer_args", "learning_rate", "unet_lr", "max_grad_norm", "lr_scheduler", "lr_scheduler_type"),
    *("lr_scheduler_args", "lr_warmup_steps", "lr_decay_steps", "lr_scheduler_num_cycles"),
    *("lr_scheduler_power", "lr_scheduler_timescale", "lr_scheduler_min_lr_ratio"),
    *("timestep_sampling", "discrete_flow_shift", "sigmoid_scale", "weighting_scheme", "logit_mean"),
    *("logit_std", "mode_scale", "min_timestep", "max_timestep", "model_prediction_type"),
    *("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale", "multires_noise_iterations"),
    *("multires_noise_discount", "ip_noise_gamma", "ip_noise_gamma_random_strength"),
    *("loss_type", "huber_c", "huber_schedule", "huber_scale"),
    *("scheduled_sampling_max_step_offset", "scheduled_sampling_step_size", "scheduled_sampling_strategy"),
    *("scheduled_sampling_probability", "scheduled_sampling_prob_start", "scheduled_sampling_prob_end"),
    *("scheduled_sampling_ramp_steps", "scheduled_sampling_start_step", "scheduled_sampling_ramp_shape"),
    *("scheduled_sampling_sampler", "scheduled_sampling_order", "scheduled_sampling_reflexflow"),
    *("scheduled_sampling_reflexflow_alpha", "scheduled_sampling_reflexflow_beta1"),
    "scheduled_sampling_reflexflow_beta2",
    *("tread_routes", "tread_off_last", "tread_keep_mask"),
    *("ema_decay", "ema_every_n_steps"),
    *("system_prompt", "gemma2_max_token_length", "use_flash_attn", "sdpa", "no_half_vae"),
    *("qwen_max_token_length", "edit_prompt_crop", "source_dropout_rate"),
}
# Have no part in the numbers of training.
SILENT_GROUPS = {
    *("saving", "sampling", "logging", "metadata", "validation", "state", "hub", "legacy", "swap"),
    "deepspeed",
    "budget",  # what it leads to is recorded where it has a part
}
SILENT = {
    *("max_data_loader_n_workers", "persistent_data_loader_workers", "ddp_timeout", "lowram", "highvram"),
    *("dry_run", "debug_dataset", "ema_sample", "skip_cache_check", "cache_directory", "vae_batch_size"),
    "vae_torch_compile",
    *("text_encoder_batch_size", "cache_latents_to_disk", "cache_text_encoder_outputs_to_disk"),
    *("disable_mmap_load_safetensors", "tokenizer_cache_dir", "quantize_device"),
    *("stream_text_encoder", "scheduler_scale"),
}
# Are judged by what they lead to: the dataset by its digest, files by their content, flags that say the same
# in other words under one of their names, start weights by the weights in the state, the seed by itself.
JUDGED_GROUPS = {"dataset"}
JUDGED = {
    *("seed", "use_8bit_adam", "use_lion_optimizer", "network_weights", "network_train_unet_only"),
    *("fp8_base", "fp8_base_unet", "fp8_scaled", "blockwise_fused_optimizers"),
    *("base_weights_multiplier", "pretrained_model_name_or_path", "gemma2", "gemma2_tokenizer", "ae"),
    *("task", "text_encoder_qwen", "text_encoder_clip", "qwen_tokenizer", "clip_tokenizer", "vae"),
}
_NETWORK = "network_module"  # is a setting of every run that trains a network, and of no other
_TRAINED_ON, _CONTENT = "trained on --", "content of --"  # and the flag of a file, whose digest is the value


def settings_of(
    options: TrainOptions, files: ModelFiles, manifest: Manifest, ledger: HashLedger
) -> dict[str, object]:
    """Return the settings that a state records of its run: by flag, and digests of files.

    Raises:
        CheckpointError: a file that is merged in or gives the ranks cannot be read.
    """
    settings: dict[str, object] = {}
    for group_name, group in vars(options).items():
        if group_name in SILENT_GROUPS | JUDGED_GROUPS:
            continue
        for f in fields(group):
            elsewhere = f.metadata["refusal"] is not None or f.metadata["inert"] is not None
            if f.name not in SILENT | JUDGED and not elsewhere:
                settings[f.name] = _plain(getattr(group, f.name))
    trainee, caching = options.trainee, options.caching
    settings["train_batch_size"] = [dataset.batch_size for dataset in manifest.trained_datasets]
    settings["optimizer_type"] = options.optimizer.optimizer_name
    settings["cache_latents"], settings["cache_text_encoder_outputs"] = caching.latents, caching.texts
    settings["base_quant"] = options.quant.transformer
    settings |= trainee.settings() | _files_of_trainee(trainee, ledger)
    settings |= {_TRAINED_ON + flag: digest for flag, digest in files.trained_on.items()}
    return settings | {_CONTENT + flag: digest for flag, digest in files.read_by.items()}


def _files_of_trainee(trainee: TraineeOptions, ledger: HashLedger) -> dict[str, object]:
    def digest(path: Path) -> str:
        return sha256_text(*(ledger.sha256(file) for file in open_checkpoint(path).files))

    found: dict[str, object] = {
        "base_weights": [f"{digest(path)[:16]} times {strength:g}" for path, strength in trainee.bases()]
    }
    if trainee.shaped_by is not None:
        found[_TRAINED_ON + "network_weights"] = digest(trainee.shaped_by)
    return found


def dataset_digest(manifest: Manifest) -> str:
    """Return a digest of the pictures to train on, their captions, and how both are used."""
    return sha256_text(*(_describe(manifest.items[index]) for index in manifest.train))


def check_resumed(
    resumed: SavedState,
    settings: Mapping[str, object],
    seed: int | None,
    dataset: str,
    *,
    new_start: str,
    stays: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """Compare a run with the state that it goes on from; return a sentence for each change that it makes.

    `new_start`: what to do where it cannot go on; `stays`: what else must be the same; see `TraineeOptions`.

    Raises:
        ConfigError: something differs that must stay.
    """
    record = resumed.record
    if seed is not None and seed != record.seed:
        raise ConfigError(
            f"--seed is {seed}, but the run in {resumed.path} has seed {record.seed}: everything random, the "
            f"order of data too, hangs on it. Leave --seed out, or give {record.seed}."
        )
    _check_trained(resumed, settings, new_start)
    changes = []
    for name in sorted(record.settings.keys() & settings.keys()):  # a flag of one version only cannot differ
        before, now = record.settings[name], settings[name]
        if before == now:
            continue
        told = f"{_flag(name)} is {_shown(now)}"
        reason = stays.get(name) or _reason_to_stay(name, now)
        if reason is not None:
            raise ConfigError(
                f"{told}, but was {_shown(before)} in {resumed.path}, and {reason}. Keep it, or {new_start}."
            )
        changes.append(f"{told} from here on; it was {_shown(before)}")
    if dataset != record.dataset:
        changes.append(
            "the dataset is not what it was: from here on the order of pictures is that of the new one"
        )
    return changes


def warnings_of_changes(resumed: SavedState, settings: Mapping[str, object]) -> list[str]:
    """Return a warning for each change that is allowed and after which another model is trained on."""
    recorded = resumed.record.settings
    before, now = recorded.get("base_quant"), settings.get("base_quant")
    if before == now or "base_quant" not in recorded:
        return []
    names = {None: "in the precision of its file"}
    was, is_now = (names.get(value, f"in {value}") for value in (before, now))
    return [
        f"the weights of {resumed.path} were trained on the model {was}, and go on on the model {is_now}, "
        f"whose own weights differ: leave --base_quant as it was unless that is meant"
    ]


def _check_trained(resumed: SavedState, settings: Mapping[str, object], new_start: str) -> None:
    """Raise ConfigError for the state of a LoRA where a model is trained, or the other way round."""
    before, now = (_NETWORK in recorded for recorded in (resumed.record.settings, settings))
    if before != now:
        what = {True: "a LoRA (..._train_network.py)", False: "the model itself (..._train.py)"}
        raise ConfigError(
            f"{resumed.path} is the state of a run that trains {what[before]}, and this one trains "
            f"{what[now]}. Go on with that script, or {new_start}."
        )


def _reason_to_stay(name: str, now: object) -> str | None:
    """Return why a setting that is `now` must be what it was, or None if it may change to that."""
    if name.startswith(_TRAINED_ON):
        return "the weights were trained on what was in it"
    if now and name in CANNOT_BEGIN:
        return CANNOT_BEGIN[name]
    return MUST_STAY.get(name)


def _describe(item: Item) -> str:
    subset = item.subset
    parts = (item.digest, item.text, item.repeats, item.geometry, item.dataset_index, subset.is_reg)
    drawing = (subset.captions, subset.images, sorted(subset.custom_attributes.items()))
    multiplier = item.dataset.network_multiplier
    source = drawn_source(item, None, flip=False)
    edited = () if source is None else (source.identity,)
    return repr((*parts, *drawing, multiplier, item.mask_path is not None, *edited))


def _plain(value: object) -> object:
    """Return a flag's value as JSON keeps it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return repr(value)


def _flag(name: str) -> str:
    for kind in (_TRAINED_ON, _CONTENT):
        if name.startswith(kind):
            return f"--{name.removeprefix(kind)} (the file's content)"
    return f"--{name}"


def _shown(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "empty"
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
