"""The nouns of the data path: options of a dataset, a picture with its place in a bucket, planned draws.

Everything here is frozen and free of torch, so that datasets are checked before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Size = tuple[int, int]  # (width, height) in pixels, everywhere in the data path
DrawKey = tuple[int, int, int, int]  # (seed, epoch, item, repeat): what random choices about pixels depend on
Kind = Literal["dreambooth", "finetuning", "conditioning"]
PRESERVED = "diff_output_preservation"  # custom attribute: train towards the base model's own output


@dataclass(frozen=True)
class BucketOptions:
    """How pictures are resized and cropped. `max_bucket_reso=None`: as long as the area rule asks for."""

    resolution: Size
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int | None = None
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False


@dataclass(frozen=True)
class CaptionOptions:
    """How a caption is made from the text beside a picture."""

    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_separator: str = ","
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0.0


@dataclass(frozen=True)
class ImageOptions:
    """How pixels are made from a picture."""

    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    alpha_mask: bool = False
    resize_interpolation: str | None = None


@dataclass(frozen=True)
class Subset:
    """One folder or metadata file of a dataset.

    `conditioning_data_dir` holds masks where `kind` says so, else the pictures that are edited.
    """

    kind: Kind
    image_dir: Path | None
    captions: CaptionOptions
    images: ImageOptions
    num_repeats: int = 1
    is_reg: bool = False
    recursive: bool = False
    caption_extension: str = ".caption"
    class_tokens: str | None = None
    metadata_file: Path | None = None
    conditioning_data_dir: Path | None = None
    cache_directory: Path | None = None
    validation_split: float = 0.0
    custom_attributes: dict[str, object] = field(default_factory=dict)

    @property
    def mask_dir(self) -> Path | None:
        """The folder of the pictures' masks, if they have any."""
        return self.conditioning_data_dir if self.kind == "conditioning" else None

    @property
    def source_dir(self) -> Path | None:
        """The folder of the pictures that those of this subset are edits of, if they are."""
        return None if self.kind == "conditioning" else self.conditioning_data_dir


@dataclass(frozen=True)
class Dataset:
    """Subsets that share a batch size and buckets; a batch never mixes datasets.

    `validation`: nothing of it is trained on. `validation_count`: how many different pictures are held out.
    """

    subsets: tuple[Subset, ...]
    buckets: BucketOptions
    batch_size: int = 1
    validation: bool = False
    validation_count: int = 0
    validation_seed: int | None = None
    network_multiplier: float = 1.0


@dataclass(frozen=True)
class Geometry:
    """Where a picture lands: resized to `resized`, then cut to `bucket` at `crop` (left, top)."""

    resized: Size
    crop: tuple[int, int]
    bucket: Size


@dataclass(frozen=True)
class Source:
    """The picture that an item is an edit of: a file, and where it lands when the item is not augmented.

    `geometry` is the item's own where both pictures have the same proportions: they are then always resized
    and cut in the same way, also when that is drawn anew each time.
    """

    path: Path
    size: Size  # after EXIF orientation
    geometry: Geometry
    digest: str  # SHA-256 of the file's bytes


@dataclass(frozen=True)
class Item:
    """One picture of one dataset, ready to be planned. `index` is its place in `Manifest.items`.

    A picture that is held out is never left to chance: it always has the same pixels and the same caption.
    """

    index: int
    dataset: Dataset = field(repr=False)
    dataset_index: int
    subset: Subset = field(repr=False)
    path: Path
    size: Size  # after EXIF orientation
    geometry: Geometry
    text: str  # caption text as written, all lines; "" when there is none
    repeats: int
    digest: str  # SHA-256 of the picture's bytes (and of its mask's, when it has one)
    mask_path: Path | None = None
    source: Source | None = None
    held_out: bool = False

    @property
    def preserved(self) -> bool:
        """Whether it is trained towards the base model's own output."""
        return bool(self.subset.custom_attributes.get(PRESERVED))


@dataclass(frozen=True)
class Manifest:
    """Everything that a dataset configuration means, after looking at the disk."""

    datasets: tuple[Dataset, ...]  # those for validation only come last
    items: tuple[Item, ...]
    train: tuple[int, ...]  # indices into items
    validation: tuple[int, ...]
    skipped: tuple[str, ...] = ()  # sentences about pictures left out by --skip_bad_images
    warnings: tuple[str, ...] = ()  # sentences about what is hardly meant so
    notes: tuple[str, ...] = ()  # sentences about what is used otherwise than one may expect

    @property
    def trained_datasets(self) -> tuple[Dataset, ...]:
        """The datasets that are not for validation only."""
        return tuple(dataset for dataset in self.datasets if not dataset.validation)


@dataclass(frozen=True)
class Draw:
    """One use of an item in training: the key of every random choice about it."""

    item: int
    repeat: int
    epoch: int
    step: int  # optimizer step, from 0
    micro: int  # micro-batch within the step
    slot: int  # place in the global micro-batch, over all processes

    def key(self, seed: int) -> DrawKey:
        """Return what `images.load_pixels` and `images.is_flipped` draw from."""
        return seed, self.epoch, self.item, self.repeat


@dataclass(frozen=True)
class MicroBatch:
    """Items that go through the model together: a part for each process, which may be empty."""

    parts: tuple[tuple[Draw, ...], ...]

    @property
    def draws(self) -> tuple[Draw, ...]:
        """Those of all processes, by slot."""
        return tuple(sorted((draw for part in self.parts for draw in part), key=lambda draw: draw.slot))
