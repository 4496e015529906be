"""What a saved network says about itself: kohya's `ss_*` keys and the `modelspec.*` keys of ModelSpec 1.0.1.

Every value is text: None, True and numbers as Python prints them, lists and tables as JSON, and of paths only
the last part, so that a shared file does not tell where its maker keeps things. This module is torch-free.
"""

from __future__ import annotations

import base64
import json
import mimetypes
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from library.data.items import Dataset, Item, Manifest, Subset
from library.options.group import OptionGroup
from library.options.network import MetadataOptions
from library.options.trainee import TraineeOptions
from library.training.family import FamilySpec
from networks.files import legacy_hash

# What readers of kohya's metadata look for and is not done here. A recorded option of that name wins.
_NOT_DONE: dict[str, object] = {
    "v2": False,
    "clip_skip": None,
    "max_token_length": None,
    "full_fp16": False,
    "full_bf16": False,
    "fp8_base": False,
    "fp8_base_unet": False,
    "lowram": False,
    "unet_lr": None,
    "text_encoder_lr": None,
    "noise_offset": None,
    "noise_offset_random_strength": False,
    "multires_noise_iterations": None,
    "multires_noise_discount": None,
    "adaptive_noise_scale": None,
    "zero_terminal_snr": False,
    "ip_noise_gamma": None,
    "ip_noise_gamma_random_strength": False,
    "min_snr_gamma": None,
    "debiased_estimation": False,
    "scale_weight_norms": None,
    "vae_name": None,
    "vae_hash": None,
    "new_vae_hash": None,
    "sd_scripts_commit_hash": None,
}
_ALWAYS = ("v2", "base_model_version", "network_module", "network_dim", "network_alpha", "network_args")


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What is known of a run before it begins.

    Attributes:
        described: what the family knows of its weight files (see `weight_file`) and text, keys without `ss_`.
        recorded: groups whose options are written one by one, each under its flag's name.
        optimizer: class and settings. seed: the one in use. started_at: seconds since 1970.
        batches_per_epoch: micro-batches that one process sees in an epoch.
    """

    family: FamilySpec
    described: Mapping[str, str]
    manifest: Manifest
    trainee: TraineeOptions
    metadata: MetadataOptions
    recorded: tuple[OptionGroup, ...]
    output_name: str
    optimizer: str
    seed: int
    session_id: str
    started_at: float
    total_steps: int
    total_epochs: int
    batches_per_epoch: int


def build_metadata(facts: TrainingFacts, *, step: int, epoch: int, now: float) -> dict[str, str]:
    """Return the metadata of the network as it is after `step` steps, in epoch `epoch`, at the time `now`.

    With `--no_metadata`, only what is needed to use the file. The hashes are added when the file is written.
    """
    recorded = {
        f.name: getattr(group, f.name) for group in (*facts.recorded, facts.trainee) for f in fields(group)
    }
    values = (
        _NOT_DONE
        | recorded
        | _dataset_values(facts.manifest)
        | dict(facts.described)
        | facts.trainee.described()
        | {
            "base_model_version": facts.family.name,
            "optimizer": facts.optimizer,
            "seed": facts.seed,
            "session_id": facts.session_id,
            "training_started_at": facts.started_at,
            "training_finished_at": now,
            "output_name": facts.output_name,
            "max_train_steps": facts.total_steps,
            "num_epochs": facts.total_epochs,
            "num_batches_per_epoch": facts.batches_per_epoch,
            "steps": step,
            "epoch": epoch,
            "training_comment": facts.metadata.training_comment,
            "sigma_convention": "sigma 0 is the clean picture, 1 is noise; the target is noise - picture",
            "software": "flow-scripts",
        }
    )
    if facts.metadata.no_metadata:
        values = {key: values[key] for key in _ALWAYS if key in values}
    return {f"ss_{key}": as_text(value) for key, value in sorted(values.items())} | _modelspec(facts, now)


def weight_file(kind: str, path: Path, sha256: str | None) -> dict[str, str]:
    """Describe a weight file by its name and by the short and long hash that kohya's readers compare.

    Args:
        kind: "sd_model" for the trained model, "vae", or the name of a text encoder.
        sha256: of the whole file; None for a folder, which then gets its name only.
    """
    described = {f"{kind}_name": path.name}
    if sha256 is not None:
        with open(path, "rb") as handle:
            described |= {f"{kind}_hash": legacy_hash(handle), f"new_{kind}_hash": sha256}
    return described


def as_text(value: object) -> str:
    """Return a value as metadata text."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=as_text)
    return str(value)


def _modelspec(facts: TrainingFacts, now: float) -> dict[str, str]:
    """The keys of https://github.com/Stability-AI/ModelSpec that are true of a flow model or its LoRA."""
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{facts.family.architecture}{facts.trainee.architecture_suffix}",
        "implementation": facts.family.implementation,
        "implementation_version": "flow-scripts",
        "title": facts.output_name,
        "date": datetime.fromtimestamp(int(now), UTC).isoformat(),
        "resolution": _resolution(facts.manifest.trained_datasets),
        "prediction_type": "flow_prediction",  # diffusers' name for the velocity of a flow
    }
    for name, value in asdict(facts.metadata).items():
        if name.startswith("metadata_") and value is not None:
            spec[name.removeprefix("metadata_")] = value
    if "thumbnail" in spec:
        spec["thumbnail"] = _data_url(spec["thumbnail"])
    return {f"modelspec.{key}": value for key, value in spec.items()}


def _resolution(datasets: Iterable[Dataset]) -> str:
    """Width x height of the dataset with the largest pictures."""
    width, height = max((d.buckets.resolution for d in datasets), key=lambda size: size[0] * size[1])
    return f"{width}x{height}"


def _data_url(thumbnail: str) -> str:
    """A data: URL stays one; a file becomes one."""
    if thumbnail.startswith("data:"):
        return thumbnail
    kind = mimetypes.guess_type(thumbnail)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(Path(thumbnail).read_bytes()).decode('ascii')}"


def _dataset_values(manifest: Manifest) -> dict[str, object]:
    """Counts, and what the datasets and subsets were told to do."""
    subsets = [subset for dataset in manifest.trained_datasets for subset in dataset.subsets]
    training = [manifest.items[index] for index in manifest.train]
    pictures = [subset.images for subset in subsets]
    captions = [subset.captions for subset in subsets]
    return {
        "num_train_images": sum(item.repeats for item in training if not item.subset.is_reg),
        "num_reg_images": sum(item.repeats for item in training if item.subset.is_reg),
        "num_validation_images": len(manifest.validation),
        "resize_interpolation": _common(p.resize_interpolation for p in pictures),
        "face_crop_aug_range": _common(p.face_crop_aug_range for p in pictures),
        "caption_dropout_rate": _common(c.caption_dropout_rate for c in captions),
        "caption_dropout_every_n_epochs": _common(c.caption_dropout_every_n_epochs for c in captions),
        "caption_tag_dropout_rate": _common(c.caption_tag_dropout_rate for c in captions),
        "validation_split": _common(subset.validation_split for subset in subsets),
        "validation_seed": _common(dataset.validation_seed for dataset in manifest.trained_datasets),
        "datasets": [_dataset_table(manifest, index) for index in range(len(manifest.trained_datasets))],
        "dataset_dirs": _dataset_dirs(manifest),
        "tag_frequency": _tag_frequency(training),
    }


def _common(values: Iterable[object]) -> object:
    """The value that all share, or else the list of them, in the order of the subsets."""
    values = list(values)
    return values[0] if all(value == values[0] for value in values) else values


def _dataset_table(manifest: Manifest, index: int) -> dict[str, object]:
    dataset = manifest.datasets[index]
    items = [item for i in manifest.train if (item := manifest.items[i]).dataset_index == index]
    buckets = dataset.buckets
    return {
        "is_dreambooth": all(subset.kind == "dreambooth" for subset in dataset.subsets),
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": sum(item.repeats for item in items if not item.subset.is_reg),
        "num_reg_images": sum(item.repeats for item in items if item.subset.is_reg),
        "resolution": buckets.resolution,
        "enable_bucket": buckets.enable_bucket,
        "min_bucket_reso": buckets.min_bucket_reso,
        "max_bucket_reso": buckets.max_bucket_reso,
        "bucket_reso_steps": buckets.bucket_reso_steps,
        "bucket_no_upscale": buckets.bucket_no_upscale,
        "network_multiplier": dataset.network_multiplier,
        "tag_frequency": _tag_frequency(items),
        "bucket_info": _bucket_info(items),
        "subsets": [_subset_table(subset, _of_subset(items, subset)) for subset in dataset.subsets],
    }


def _subset_table(subset: Subset, items: Sequence[Item]) -> dict[str, object]:
    table = {
        "img_count": len(items),
        "num_repeats": subset.num_repeats,
        **asdict(subset.images),
        **asdict(subset.captions),
        "is_reg": subset.is_reg,
        "class_tokens": subset.class_tokens,
    }
    for name in ("image_dir", "metadata_file", "conditioning_data_dir"):
        path = getattr(subset, name)
        if path is not None:
            table[name] = path.name
    return table


def _of_subset(items: Iterable[Item], subset: Subset) -> list[Item]:
    return [item for item in items if item.subset is subset]


def _bucket_info(items: Sequence[Item]) -> dict[str, object]:
    """Draws an epoch makes from each bucket, and the mean error of the buckets' aspect ratio."""
    counts: Counter[tuple[int, int]] = Counter()
    for item in items:
        counts[item.geometry.bucket] += item.repeats
    errors = [abs(_ratio(item.geometry.bucket) - _ratio(item.size)) for item in items]
    return {
        "buckets": {
            str(number): {"resolution": bucket, "count": counts[bucket]}
            for number, bucket in enumerate(sorted(counts))
        },
        "mean_img_ar_error": sum(errors) / max(1, len(errors)),
    }


def _ratio(size: tuple[int, int]) -> float:
    return size[0] / size[1]


def _dataset_dirs(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Pictures and repeats by the name of the folder (or metadata file), regularisation pictures left out."""
    training = [manifest.items[index] for index in manifest.train]
    found: dict[str, dict[str, int]] = {}
    for dataset in manifest.trained_datasets:
        for subset in dataset.subsets:
            if subset.is_reg:
                continue
            count = len(_of_subset(training, subset))
            found[_free_name(_source(subset), found)] = {"n_repeats": subset.num_repeats, "img_count": count}
    return found


def _free_name(name: str, taken: Mapping[str, object]) -> str:
    """A second folder of the same name becomes "name (2)"."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name} ({number})"
    return free


def _source(subset: Subset) -> str:
    return (subset.metadata_file or subset.image_dir or Path()).name


def _tag_frequency(items: Iterable[Item]) -> dict[str, dict[str, int]]:
    """In how many captions each tag occurs, by folder; a picture in several datasets counts once."""
    counted: set[Path] = set()
    found: dict[str, Counter[str]] = {}
    for item in items:
        if item.path in counted:
            continue
        counted.add(item.path)
        texts = item.text.replace("\n", item.subset.captions.caption_separator)
        tags = (tag.strip().lower() for tag in texts.split(item.subset.captions.caption_separator))
        found.setdefault(_source(item.subset), Counter()).update(tag for tag in tags if tag)
    return {name: dict(counts) for name, counts in found.items()}
