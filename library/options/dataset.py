"""Which pictures and captions to train on, and the defaults of what a dataset configuration leaves open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.core.errors import ConfigError
from library.options.group import OptionGroup, option

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


def size(word: str) -> tuple[int, int]:
    """Read 'S' or 'W,H' as (width, height). Raises ValueError."""
    numbers = [int(part) for part in word.split(",")]
    if len(numbers) not in (1, 2):
        raise ValueError(word)
    return numbers[0], numbers[-1]


def interval(word: str) -> tuple[float, float]:
    """Read 'low,high'. Raises ValueError."""
    low, high = (float(part) for part in word.split(","))
    return low, high


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(OptionGroup):
    """Dataset.

    Where the pictures are: --dataset_config, or folders named here. All other options of this group are
    defaults for what a dataset configuration does not say.
    """

    dataset_config: Path | None = option(None, "TOML or JSON file that describes the datasets")
    train_data_dir: Path | None = option(
        None, "folder of folders named <repeats>_<class tokens>; with --in_json the folder of its pictures"
    )
    reg_data_dir: Path | None = option(None, "such a folder of folders with regularisation pictures")
    in_json: Path | None = option(None, "metadata file (.json or .jsonl) with captions of the pictures")
    conditioning_data_dir: Path | None = option(
        None,
        "masks for --train_data_dir, in folders of the same names; needs --masked_loss. For models that edit "
        "pictures: what is edited, the --train_data_dir showing what becomes of it",
    )
    masked_loss: bool = option(False, "weigh the loss by masks (conditioning_data_dir or alpha_mask)")
    cache_info: bool = option(
        False, "remember what is known of pictures for the next start, which is what happens without it too"
    )
    skip_bad_images: bool = option(False, "leave out pictures that cannot be read, and list them")

    resolution: tuple[int, int] | None = option(
        None, "training size in pixels, 'S' or 'W,H'", parse=size, metavar="SIZE"
    )
    train_batch_size: int = option(1, "pictures in a batch of one process")
    dataset_repeats: int = option(1, "how often each picture is used in an epoch (num_repeats)")
    validation_split: float = option(0.0, "share of the pictures held out for validation, 0 to 1")
    validation_count: int = option(0, "how many different pictures of each dataset are held out instead")
    validation_seed: int | None = option(None, "chooses another set of held-out pictures")

    enable_bucket: bool = option(False, "sort pictures into buckets by their proportions")
    min_bucket_reso: int | None = option(
        None, "shortest bucket side (default: 256, or half of a resolution below 512)"
    )
    max_bucket_reso: int | None = option(None, "longest bucket side (default: what the area allows)")
    bucket_reso_steps: int = option(64, "bucket sides are multiples of this; 16 crops least")
    bucket_no_upscale: bool = option(False, "never enlarge a picture; small ones get small buckets")
    resize_interpolation: str | None = option(
        None, "how pictures are resized (default: area down, lanczos up)", choices=INTERPOLATIONS
    )

    flip_aug: bool = option(False, "mirror every second picture, at random")
    color_aug: bool = option(False, "shift hue or gamma of every third picture a little")
    random_crop: bool = option(False, "crop at random instead of in the middle")
    face_crop_aug_range: tuple[float, float] | None = option(
        None,
        "crop around the face that the file name tells; the short side is LOW to HIGH face sizes",
        parse=interval,
        metavar="LOW,HIGH",
    )
    alpha_mask: bool = option(False, "use a picture's alpha channel as its loss mask")

    caption_extension: str = option(
        ".caption", "ending of caption files; many datasets have .txt", aliases=("caption_extention",)
    )
    caption_prefix: str | None = option(None, "text put before every caption")
    caption_suffix: str | None = option(None, "text put after every caption")
    caption_separator: str = option(",", "what separates the tags of a caption")
    shuffle_caption: bool = option(False, "shuffle the tags of a caption")
    keep_tokens: int = option(0, "first tags that stay in place")
    keep_tokens_separator: str = option(
        "", "separates fixed from flexible tags, as in 'fixed ||| flexible ||| fixed'"
    )
    secondary_separator: str | None = option(None, "joins tags that stay together while shuffling")
    enable_wildcard: bool = option(False, "draw one of {a|b|c}, and one line of a caption of several")
    caption_dropout_rate: float = option(0.0, "share of the draws that train with an empty caption")
    caption_dropout_every_n_epochs: int = option(0, "every Nth epoch trains with empty captions")
    caption_tag_dropout_rate: float = option(0.0, "chance of each flexible tag to be left out")
    token_warmup_min: int = option(1, "flexible tags at the start of the warm-up")
    token_warmup_step: float = option(0.0, "steps until all tags are there; below 1 a share of all steps")

    def __post_init__(self) -> None:
        if self.dataset_config:
            return
        if self.in_json:
            for name in ("reg_data_dir", "conditioning_data_dir"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"--{name} cannot go with --in_json; leave out one of them.")
        elif not self.train_data_dir:
            raise ConfigError("no dataset is given: name --dataset_config, --train_data_dir or --in_json.")

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag that another place decides."""
        yield from super().adjustments()
        if self.dataset_config:
            folders = ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir")
            yield from self.without_effect(folders, f"--dataset_config {self.dataset_config} names the data")
        elif not self.in_json:
            yield from self.without_effect(("dataset_repeats",), "the folders' names tell the repeats")
