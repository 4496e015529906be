"""What must be the same when a run is resumed, and what may change. Torch-free.

Three kinds of settings: those that the saved tensors or the promise of the run hang on must stay; those that
have no part in the numbers may change silently; all others may change from here on, and a line says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from library.core.errors import ConfigError
from library.core.hashing import sha256_text
from library.data.items import Item, Manifest
from library.options.train import TrainOptions
from library.training.state.checkpoint import SavedState

# The trained tensors and the optimizer's have the shapes, meanings and start values that these gave them.
MUST_STAY = {
    "network_module": "the state holds the weights of this kind of network",
    "network_dim": "the state holds weights of this rank",
    "network_alpha": "the weights were trained at this strength",
    "network_args": "the state holds weights of these layers and ranks",
    "base_weights": "the network was trained on the model with these merged in",
    "base_weights_multiplier": "the network was trained on the model with its files merged in so strongly",
    "optimizer_type": "the state holds what this optimizer remembers",
    "full_bf16": "the state holds weights of this precision",
    "new_sd_model_hash": "the network was trained on this model",
}
# Groups and flags that have no part in the numbers of training, or are judged by what they lead to: the data
# by their digest, the files by their content, the start weights by the weights in the state.
SILENT_GROUPS = {
    *("saving", "sampling", "logging", "metadata", "validation"),
    *("dataset", "model", "state", "hub", "legacy"),
}
SILENT = {
    *("seed", "max_data_loader_n_workers", "persistent_data_loader_workers", "ddp_timeout"),
    *("lowram", "highvram", "dry_run", "debug_dataset", "network_weights", "vae_batch_size"),
    *("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs"),
    *("cache_text_encoder_outputs_to_disk", "cache_directory", "text_encoder_batch_size"),
}
# Of the silent group "model", what training is told apart by besides the files.
TOLD = {"system_prompt", "gemma2_max_token_length"}


def settings_of(options: TrainOptions, described: Mapping[str, str], manifest: Manifest) -> dict[str, object]:
    """Return the settings that a state records of its run: flags by name, and hashes of the weight files."""
    settings: dict[str, object] = {"train_batch_size": [dataset.batch_size for dataset in manifest.datasets]}
    for group_name, group in vars(options).items():
        for name, value in vars(group).items():
            silent = name in SILENT or (group_name in SILENT_GROUPS and name not in TOLD)
            secret = name.endswith(("_token", "_key"))
            if not (silent or secret):
                settings[name] = _plain(value)
    return settings | {k: v for k, v in described.items() if k.startswith("new_") and k.endswith("_hash")}


def dataset_digest(manifest: Manifest) -> str:
    """Return a digest of the pictures to train on, their captions, and how both are used."""
    return sha256_text(*(_describe(manifest.items[index]) for index in manifest.train))


def check_resumed(
    resumed: SavedState, settings: Mapping[str, object], seed: int | None, dataset: str
) -> list[str]:
    """Compare a run with the state that it goes on from; return a sentence for each change that it makes.

    Raises:
        ConfigError: something differs that must stay.
    """
    record = resumed.record
    if seed is not None and seed != record.seed:
        raise ConfigError(
            f"--seed is {seed}, but the run in {resumed.path} has seed {record.seed}: everything random, the "
            f"order of data too, hangs on it. Leave --seed out, or give {record.seed}."
        )
    changes = []
    for name in sorted(record.settings.keys() & settings.keys()):  # a flag of one version only cannot differ
        before, now = record.settings[name], settings[name]
        if before == now:
            continue
        if name in MUST_STAY:
            raise ConfigError(
                f"{_flag(name)} is {_shown(now)}, but was {_shown(before)} in {resumed.path}, and "
                f"{MUST_STAY[name]}. Keep it, or start a new run from the LoRA file with --network_weights."
            )
        changes.append(f"{_flag(name)} is {_shown(now)} from here on; it was {_shown(before)}")
    if dataset != record.dataset:
        changes.append(
            "the dataset is not what it was: from here on the order of pictures is that of the new one"
        )
    return changes


def _describe(item: Item) -> str:
    subset = item.subset
    parts = (item.digest, item.text, item.repeats, item.geometry, item.dataset_index, subset.is_reg)
    drawing = (subset.captions, subset.images, sorted(subset.custom_attributes.items()))
    multiplier = item.dataset.network_multiplier
    return repr((*parts, *drawing, multiplier, item.mask_path is not None))


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
    if name.startswith("new_"):
        kind = name.removeprefix("new_").removesuffix("_hash")
        flags = {"sd_model": "pretrained_model_name_or_path", "vae": "ae"}
        return f"--{flags.get(kind, kind)} (the file's content)"
    return f"--{name}"


def _shown(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "empty"
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
