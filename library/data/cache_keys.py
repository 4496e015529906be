"""What a cache entry is known by, where it lies, and what can be cached at all. Free of torch.

An entry's key is the SHA-256 of everything that decides its content, so a changed picture, caption, option or
model asks for another key and finds nothing old there; entries for several resolutions, encoders or
precisions lie side by side, and changing a setting back finds the old ones again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from library.core.errors import ConfigError
from library.core.hashing import sha256_text
from library.data.images import drawn_source
from library.data.items import Dataset, ImageOptions, Item
from library.data.prompt import Prompt, SourcePicture

HIDDEN_FOLDER = ".flow-cache"

# Raise when the same settings begin to give other numbers: LATENTS when pixels are made differently
# (images.py, tensors.py), TEXTS when what an encoder is given for a text changes.
_LATENTS_VERSION = 1
_TEXTS_VERSION = 1


def latents_key(item: Item, encoder_identity: str, dtype: str) -> str:
    """Return the key of the latents of a picture and of its source, flipped and not, and of its mask.

    They share an entry.

    Args:
        encoder_identity: names the autoencoder and its settings; any text that changes when its output would.
        dtype: precision of the stored latents, "bf16" or "fp32".
    """
    geometry, options = item.geometry, item.subset.images
    numbers = (*geometry.resized, *geometry.crop, *geometry.bucket)
    source = drawn_source(item, None, flip=False)
    return sha256_text(
        f"latents {_LATENTS_VERSION}",
        item.digest,
        " ".join(map(str, numbers)),
        f"flip={options.flip_aug} alpha_mask={options.alpha_mask} mask={item.mask_path is not None}",
        f"resize={options.resize_interpolation}",
        encoder_identity,
        dtype,
        *_pixels_of(source),
    )


def text_key(prompt: Prompt, encoder_identity: str, dtype: str) -> str:
    """Return the key of a prompt's features.

    Args:
        prompt: exactly what the encoder is given, with the system prompt where there is one.
        encoder_identity: names the encoder, its tokenizer, the token limit and its settings.
        dtype: precision of the stored features, "bf16" or "fp32".
    """
    return sha256_text(
        f"texts {_TEXTS_VERSION}", prompt.text, encoder_identity, dtype, *_pixels_of(prompt.source)
    )


def _pixels_of(source: SourcePicture | None) -> tuple[str, ...]:
    """What decides a source's pixels. Without one it is nothing, so that such entries keep their keys."""
    return () if source is None else (f"pixels {_LATENTS_VERSION}", source.identity)


def cache_directory(item: Item, override: Path | None) -> Path:
    """Return the folder of an item's entries.

    The subset's own `cache_directory` wins, then `override` (--cache_directory), then a hidden folder beside
    the pictures.
    """
    subset = item.subset
    if subset.cache_directory or override:
        return subset.cache_directory or override
    if subset.image_dir:
        return subset.image_dir / HIDDEN_FOLDER
    beside = subset.metadata_file or item.path
    return beside.parent / HIDDEN_FOLDER


def check_latents_cacheable(datasets: Sequence[Dataset]) -> None:
    """Raise ConfigError if a subset's pixels are drawn anew each epoch: there is no one latent to keep."""
    for subset in (subset for dataset in datasets for subset in dataset.subsets):
        drawn = _drawn_anew(subset.images)
        if drawn:
            raise ConfigError(
                f"{' and '.join(drawn)} of {subset.image_dir or subset.metadata_file} cannot be used with "
                f"--cache_latents: the pixels change from epoch to epoch, and the cache holds one latent a "
                f"picture. Leave out one of the two."
            )


def check_texts_cacheable(datasets: Sequence[Dataset]) -> None:
    """Raise ConfigError if what a text encoder sees of a subset's sources is drawn anew each epoch."""
    for subset in (subset for dataset in datasets for subset in dataset.subsets if subset.source_dir):
        drawn = _drawn_anew(subset.images)
        if drawn:
            raise ConfigError(
                f"{' and '.join(drawn)} of {subset.image_dir} cannot be used with "
                f"--cache_text_encoder_outputs: the text encoder sees the source pictures of "
                f"{subset.source_dir}, which change from epoch to epoch. Leave out one of the two."
            )


def _drawn_anew(options: ImageOptions) -> list[str]:
    names = ("random_crop", "color_aug", "face_crop_aug_range")
    return [name for name in names if getattr(options, name)]
