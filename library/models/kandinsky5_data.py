"""What of a dataset and of sample prompts Kandinsky 5.0 Image cannot take. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from library.data.items import Manifest, Size
from library.models.kandinsky5_format import check_patches
from library.models.kandinsky5_prompt import check_text
from library.options.request import SIZE_STEP, ImageRequest


def check_data(manifest: Manifest, samples: Iterable[ImageRequest]) -> None:
    """Check what is trained on, and what is drawn meanwhile.

    Raises:
        ConfigError: a picture is larger than the model has positions for. DataError: a text that goes with a
            source picture has the mark of a picture inside.
    """
    for item in manifest.items:
        _check_size(item.geometry.bucket, f"{item.path}: a picture")
        check_text(item.text, item.source and item.source.path)
    for sample in samples:
        _check_size((sample.width, sample.height), "A sample picture")
        check_text(sample.prompt, sample.source)
        check_text(sample.negative_prompt, sample.source)


def _check_size(size: Size, what: str) -> None:
    check_patches(size[1] // SIZE_STEP, size[0] // SIZE_STEP, what)
