"""From a dataset configuration (TOML, JSON or the command line's folders) to checked `Dataset` objects.

A key may stand in `[general]`, `[[datasets]]` or `[[datasets.subsets]]`; the lowest place wins, and the
command line's options are the defaults. Everything is checked before a picture is opened, and all mistakes
are told at once with their lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from library.core.errors import ConfigError
from library.core.log import logger
from library.core.suggest import did_you_mean
from library.core.toml_file import read_content, table_of
from library.data.config_report import Place, Report, path_of
from library.data.config_tables import DatasetTable, GeneralTable, OptionsTable, SubsetTable, check_table
from library.data.folders import source_from_options
from library.data.items import PRESERVED, BucketOptions, CaptionOptions, Dataset, ImageOptions, Kind, Subset
from library.options.dataset import DatasetOptions

Table = dict[str, Any]

_log = logger("data")
_PATHS = ("image_dir", "metadata_file", "conditioning_data_dir", "cache_directory")
_KIND_KEYS: dict[Kind, str] = {"finetuning": "metadata_file", "conditioning": "conditioning_data_dir"}
_NOT_FOR: dict[Kind, tuple[str, ...]] = {
    "dreambooth": (),
    "finetuning": ("is_reg", "class_tokens", "caption_extension", "recursive"),
    "conditioning": ("is_reg", "alpha_mask"),
}
_NAMES_ON_COMMAND_LINE = {"num_repeats": "dataset_repeats", "batch_size": "train_batch_size"}
_FLAGS = {f.name for f in fields(DatasetOptions)}
# What has no effect in a dataset that is only for validation: all of it is held out, and a picture that is
# held out is used once and left as it is.
_NOT_FOR_VALIDATION = (
    *("is_reg", "num_repeats", "validation_split", "validation_count", "validation_seed"),
    *("flip_aug", "color_aug", "random_crop", "face_crop_aug_range"),
    *("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate"),
    *("token_warmup_min", "token_warmup_step"),
)
_OF_BACKENDS = frozenset({"instance_data_dir", "dataset_type"})  # keys of SimpleTuner's multidatabackend.json
_ATTRIBUTES_READ = frozenset({PRESERVED})  # keys of custom_attributes that something acts on


def load_datasets(
    options: DatasetOptions, *, stride: int, edits: bool = False, tell: Callable[[str], None] = _log.info
) -> tuple[Dataset, ...]:
    """Read and check the datasets that the options name.

    Args:
        stride: pixels that sides of trained pictures must be multiples of (VAE stride times patch size).
        edits: the model edits pictures, and `conditioning_data_dir` has those that are edited; else it has
            masks.
        tell: is given a sentence for what is done otherwise than it is written, as in sd-scripts.

    Raises:
        ConfigError: all mistakes in one message.
    """
    if options.dataset_config:
        content = _read(options.dataset_config)
    else:
        content = source_from_options(options, edits=edits, tell=tell)
    report = Report(options.dataset_config)
    builder = _Builder(options, stride, edits, report)
    datasets = builder.datasets(content)
    report.raise_if_any()
    for sentence in (*builder.notes, *_flags_without_effect(options, content)):
        tell(sentence)
    return tuple(datasets)


def _flags_without_effect(options: DatasetOptions, content: Table) -> Iterator[str]:
    """Yield a sentence for each flag of the command line that a dataset configuration always overrules."""
    if options.dataset_config is None:
        return
    keys = {key: _NAMES_ON_COMMAND_LINE.get(key, key) for key in OptionsTable.model_fields}
    decided = [flag for key, flag in keys.items() if flag in _FLAGS and _is_decided(key, content)]
    yield from options.without_effect(decided, f"{options.dataset_config} says it for all pictures")


def _is_decided(key: str, content: Table) -> bool:
    """Whether a key is in `[general]`, or in each dataset or all its subsets."""

    def has(table: Table) -> bool:
        return table.get(key) is not None

    return has(content.get("general", {})) or all(
        has(dataset) or all(map(has, dataset["subsets"])) for dataset in content["datasets"]
    )


def _read(path: Path) -> Table:
    what = "The dataset configuration"
    content = read_content(path, what)
    rows = content if isinstance(content, list) else []
    if any(isinstance(row, dict) and row.keys() & _OF_BACKENDS for row in rows):
        raise ConfigError(
            f"{what} {path} is a list of SimpleTuner's data backends. Here it is a TOML or JSON file with "
            f"[[datasets]], whose subsets name a folder as image_dir, there instance_data_dir; "
            f"docs/datasets.md has an example, and docs/kandinsky5.md other keys."
        )
    return table_of(content, path, what)


class _Builder:
    """Builds datasets level by level; a mistake goes to the report, and what depends on it is left out."""

    def __init__(self, options: DatasetOptions, stride: int, edits: bool, report: Report) -> None:
        self.options = options
        self.stride = stride
        self.edits = edits
        self.report = report
        self.notes: list[str] = []

    def datasets(self, content: Table) -> list[Dataset]:
        for key in content.keys() - {"general", "datasets"}:
            near = did_you_mean(key, ("general", "datasets"))
            self.report.add((key,), "unknown table" + (near or "; there are [general] and [[datasets]]"))
        defaults = self._defaults_of_options()
        general = check_table(GeneralTable, content.get("general", {}), ("general",), self.report)
        tables = self._list(content.get("datasets"), ("datasets",))
        built = [self._dataset(table, place, [defaults, general]) for place, table in tables]
        complete = [dataset for dataset in built if dataset]
        if len(complete) == len(tables):
            self._check_masks(complete)
            if complete and all(dataset.validation for dataset in complete):
                self.report.add(("datasets",), "all have validation = true; add one to train on")
        return complete

    def _defaults_of_options(self) -> Table | None:
        given = {f.name: getattr(self.options, f.name) for f in fields(self.options)}
        for name, flag in _NAMES_ON_COMMAND_LINE.items():
            given[name] = given[flag]
        known = {k: v for k, v in given.items() if k in OptionsTable.model_fields and v is not None}
        flags = Report(None)
        checked = check_table(OptionsTable, known, (), flags)
        for place, sentence in flags.mistakes:
            flag = _NAMES_ON_COMMAND_LINE.get(str(place[0]), place[0])
            self.report.add((f"--{flag}",), sentence)
        return checked

    def _list(self, value: Any, place: Place) -> list[tuple[Place, Any]]:
        header = ".".join(str(part) for part in place if isinstance(part, str))
        if not isinstance(value, list) or not value:
            self.report.add(place, f"there must be at least one [[{header}]]")
            return []
        return [((*place, i), table) for i, table in enumerate(value)]

    def _dataset(self, content: Any, place: Place, outer: list[Table | None]) -> Dataset | None:
        table = check_table(DatasetTable, content, place, self.report)
        subsets = content.get("subsets") if isinstance(content, dict) else None
        rows = self._list(subsets, (*place, "subsets")) if isinstance(subsets, list) else []
        checked = [(p, check_table(SubsetTable, row, p, self.report)) for p, row in rows]
        levels = [*outer, table]
        if any(level is None for level in levels):
            return None
        merged = _merged(levels)
        buckets = self._buckets(merged, place)
        built = [self._subset(row, merged, p) for p, row in checked if row is not None]
        complete = [subset for subset in built if subset]
        if buckets is None or not rows or len(complete) < len(rows):
            return None
        dataset = _pick(Dataset, merged, subsets=tuple(complete), buckets=buckets)
        self._check_dataset(dataset, place)
        if dataset.validation:
            self._check_validation(content, place)
            return replace(dataset, validation_count=0, validation_seed=None)
        if dataset.validation_count and any(subset.validation_split for subset in complete):
            self.report.add(
                (*place, "validation_count"),
                "and validation_split cannot both say what is held out (higher levels and flags count, too): "
                "set one of them to 0",
            )
        return dataset

    def _buckets(self, merged: Table, place: Place) -> BucketOptions | None:
        if "resolution" not in merged:
            elsewhere = " here, in [general], or as --resolution" if self.report.source else ""
            self.report.add((*place, "resolution"), f"is required{elsewhere}")
            return None
        resolution = (merged["resolution"][0], merged["resolution"][1])
        smallest = _default_min_bucket(resolution, merged["bucket_reso_steps"])
        written = _pick(BucketOptions, {"min_bucket_reso": smallest} | merged, resolution=resolution)
        buckets = self._on_steps(written, place)
        mistakes = list(_bucket_mistakes(buckets, self.stride))
        for key, sentence in mistakes:
            self.report.add((*place, key), sentence)
        return None if mistakes else buckets

    def _on_steps(self, buckets: BucketOptions, place: Place) -> BucketOptions:
        """Round the bounds of buckets outwards to steps, as sd-scripts does."""
        step, changes = buckets.bucket_reso_steps, {}
        shortest, longest = buckets.min_bucket_reso, buckets.max_bucket_reso
        if not buckets.enable_bucket:
            return buckets
        if shortest % step:
            changes["min_bucket_reso"] = max(step, shortest // step * step)
        if longest is not None and longest % step:
            changes["max_bucket_reso"] = -(-longest // step) * step
        for key, value in changes.items():
            self.notes.append(
                f"{self.report.name((*place, key))}: {getattr(buckets, key)} becomes {value}, a multiple of "
                f"bucket_reso_steps {step}"
            )
        return replace(buckets, **changes)

    def _subset(self, table: Table, outer: Table, place: Place) -> Subset | None:
        merged = outer | table
        for key in _PATHS:
            if key in merged:
                merged[key] = Path(merged[key])
        kind = _kind(merged, self.edits)
        mistakes = [
            *_kind_mistakes(kind, table, self.options),
            *_path_mistakes(kind, merged),
            *(_source_mistakes(merged) if self.edits else ()),
            *_other_mistakes(merged),
        ]
        for key, sentence in mistakes:
            self.report.add((*place, key), sentence)
        if mistakes:
            return None
        if not merged["caption_extension"].startswith("."):
            merged["caption_extension"] = "." + merged["caption_extension"]
        if "face_crop_aug_range" in merged:
            merged["face_crop_aug_range"] = tuple(merged["face_crop_aug_range"])
        captions, images = _pick(CaptionOptions, merged), _pick(ImageOptions, merged)
        merged.setdefault("image_dir", None)
        return _pick(Subset, merged, kind=kind, captions=captions, images=images)

    def _check_dataset(self, dataset: Dataset, place: Place) -> None:
        first, seen = dataset.subsets[0], {}
        for i, subset in enumerate(dataset.subsets):
            here = (*place, "subsets", i)
            if subset.kind != first.kind:
                self.report.add(
                    here,
                    f"is of kind {subset.kind}, and the dataset's first subset is of kind {first.kind}: give "
                    f"each kind a [[datasets]] of its own",
                )
            source = (subset.metadata_file or subset.image_dir).resolve()
            if source in seen:
                self.report.add(
                    here,
                    f"{subset.metadata_file or subset.image_dir} is already used by "
                    f"{path_of(seen[source])}: raise num_repeats there, or give it a [[datasets]] of its own",
                )
            seen.setdefault(source, here)
        if all(subset.is_reg for subset in dataset.subsets):
            self.report.add(place, "has only regularisation subsets; add one to train on")

    def _check_validation(self, table: Table, place: Place) -> None:
        """Name the keys of the dataset itself and of its subsets that ask for what validation never does."""
        tables = [(place, table), *(((*place, "subsets", i), row) for i, row in enumerate(table["subsets"]))]
        for here, keys in tables:
            for key in _NOT_FOR_VALIDATION:
                if key in keys:
                    self.report.add(
                        (*here, key), "has no effect in a dataset with validation = true; remove it"
                    )

    def _check_masks(self, datasets: Sequence[Dataset]) -> None:
        subsets = [subset for dataset in datasets for subset in dataset.subsets]
        masked = any(s.kind == "conditioning" or s.images.alpha_mask for s in subsets)
        if subsets and self.options.masked_loss and not masked:
            folder = "" if self.edits else "conditioning_data_dir (folder of masks) or "
            self.report.add(("--masked_loss",), f"no subset has masks; give one {folder}alpha_mask = true")


def _merged(levels: Sequence[Table | None]) -> Table:
    merged: Table = {}
    for level in levels:
        merged |= level or {}
    return merged


Made = TypeVar("Made")


def _pick(made: type[Made], table: Table, **more: Any) -> Made:
    """Make a dataclass from those keys of a table that it has."""
    names = {f.name for f in fields(made)} - more.keys()
    return made(**{k: v for k, v in table.items() if k in names}, **more)


def _default_min_bucket(resolution: tuple[int, int], step: int) -> int:
    return max(step, min(256, min(resolution) // 2) // step * step)


def _bucket_mistakes(buckets: BucketOptions, stride: int) -> list[tuple[str, str]]:
    """What is wrong with resolution and bucket options, by key."""
    sides, step = buckets.resolution, buckets.bucket_reso_steps
    if not buckets.enable_bucket:
        return _sides_off_stride(sides, stride)
    mistakes = []
    if step % stride:
        mistakes.append(("bucket_reso_steps", f"{step} is not divisible by {stride}"))
    elif step > min(sides):
        mistakes.append(("bucket_reso_steps", f"{step} is more than the resolution {min(sides)}"))
    elif buckets.min_bucket_reso > min(sides):
        mistakes.append(
            (
                "min_bucket_reso",
                f"{buckets.min_bucket_reso} is more than the resolution {min(sides)}; lower it",
            )
        )
    if buckets.max_bucket_reso is not None and buckets.max_bucket_reso < max(sides):
        mistakes.append(
            (
                "max_bucket_reso",
                f"{buckets.max_bucket_reso} is less than the resolution {max(sides)}; raise it, or leave it "
                f"out to let the area decide",
            )
        )
    return mistakes


def _sides_off_stride(sides: tuple[int, int], stride: int) -> list[tuple[str, str]]:
    """Without buckets every picture gets these sides; with them only the area counts."""
    mistakes = []
    for side in sorted({side for side in sides if side % stride}):
        below = side // stride * stride
        near = f"{below} or {below + stride}" if below else f"{stride}"
        mistakes.append(("resolution", f"{side} is not divisible by {stride}; the nearest is {near}"))
    return mistakes


def _kind(merged: Table, edits: bool) -> Kind:
    if "conditioning_data_dir" in merged and not edits:
        return "conditioning"
    return "finetuning" if "metadata_file" in merged else "dreambooth"


def _kind_mistakes(kind: Kind, table: Table, options: DatasetOptions) -> list[tuple[str, str]]:
    mistakes = []
    if kind == "conditioning" and "metadata_file" in table:
        mistakes.append(("metadata_file", "cannot go with conditioning_data_dir; leave out one of them"))
    if kind == "conditioning" and not options.masked_loss:
        mistakes.append(
            (
                "conditioning_data_dir",
                "has no effect without --masked_loss, for which it has masks; add that flag, or train an "
                "image-to-image model, for which it has the pictures to edit",
            )
        )
    for key in _NOT_FOR[kind]:
        if key in table:
            mistakes.append((key, f"has no effect in a subset with {_KIND_KEYS[kind]}; remove it"))
    return mistakes


def _path_mistakes(kind: Kind, merged: Table) -> list[tuple[str, str]]:
    mistakes = []
    if kind != "finetuning" and "image_dir" not in merged:
        mistakes.append(("image_dir", "is required (or metadata_file)"))
    for key in ("image_dir", "conditioning_data_dir"):
        if key in merged and not merged[key].is_dir():
            what = "is not a folder" if merged[key].exists() else "does not exist"
            mistakes.append((key, f"the folder {merged[key]} {what}"))
    if "metadata_file" in merged:
        file = merged["metadata_file"]
        if file.suffix.lower() not in (".json", ".jsonl"):
            mistakes.append(("metadata_file", f"{file} must end in .json or .jsonl"))
        elif not file.is_file():
            mistakes.append(("metadata_file", f"the file {file} does not exist"))
    return mistakes


def _source_mistakes(merged: Table) -> list[tuple[str, str]]:
    """What is wrong with a folder of pictures that are edited."""
    if "conditioning_data_dir" not in merged:
        return []
    key, folder, pictures = "conditioning_data_dir", merged["conditioning_data_dir"], merged.get("image_dir")
    if pictures is None:
        return [(key, "pairs pictures by where they lie in image_dir; say what that is")]
    if folder.resolve() == pictures.resolve():
        return [(key, f"{folder} is image_dir itself: every picture would be an edit of itself")]
    if merged.get("recursive") and folder.resolve().is_relative_to(pictures.resolve()):
        return [
            (
                key,
                f"{folder} lies in image_dir, whose subfolders are trained on too (recursive = true); put it "
                f"elsewhere",
            )
        ]
    return []


def _other_mistakes(merged: Table) -> list[tuple[str, str]]:
    unread = sorted(merged.get("custom_attributes", {}).keys() - _ATTRIBUTES_READ)
    mistakes = [
        ("custom_attributes", f"nothing reads '{key}', only {PRESERVED}; remove it") for key in unread
    ]
    preserved = merged.get("custom_attributes", {}).get(PRESERVED, False)
    if not isinstance(preserved, bool):
        mistakes.append(("custom_attributes", f"{PRESERVED} must be true or false, not {preserved!r}"))
    if "face_crop_aug_range" in merged and merged["enable_bucket"]:
        mistakes.append(
            (
                "face_crop_aug_range",
                "cuts pictures to `resolution` around a face; it needs enable_bucket = false",
            )
        )
    return mistakes
