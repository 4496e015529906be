"""Options of kandinsky5_minimal_inference.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from library.options.group import REQUIRED, option
from library.options.inference import DTYPES, InferenceOptions, PictureOptions
from library.options.kandinsky5 import (
    T2I,
    Kandinsky5EncoderOptions,
    Kandinsky5TransformerOptions,
    task_named,
)
from library.options.request import ImageRequest

# What the model was trained to draw, (width, height) in pixels.
SIZES = (*((1024, 1024), (640, 1408), (1408, 640), (768, 1280), (1280, 768), (896, 1152), (1152, 896)),)
_SIDE = "in pixels, a multiple of 16; default: 1024, or as the picture that is edited; see docs/inference.md"


@dataclass(frozen=True, kw_only=True)
class Kandinsky5InferenceModelOptions(Kandinsky5EncoderOptions, Kandinsky5TransformerOptions):
    """Models.

    Weight files may be single files (as published, or for ComfyUI) or folders of diffusers; the layout is
    read from the file.
    """

    vae: Path = option(REQUIRED, "the FLUX autoencoder: a .safetensors file or a folder", aliases=("ae",))
    dtype: str = option("bf16", "precision of the DiT", choices=DTYPES)
    text_encoder_dtype: str = option("bf16", "precision of the text encoders", choices=DTYPES)
    vae_dtype: str = option("bf16", "precision of the autoencoder", choices=DTYPES)

    def __post_init__(self) -> None:
        Kandinsky5EncoderOptions.__post_init__(self)

    def adjustments(self) -> Iterator[str]:
        """Tell of a flag that has nothing to do with pictures from text alone."""
        yield from super().adjustments()
        if task_named(self.task) == T2I:
            yield from self.without_effect(("edit_prompt_crop",), f"--task {self.task} edits no pictures")


@dataclass(frozen=True, kw_only=True)
class Kandinsky5PictureOptions(PictureOptions):
    """Pictures.

    With --from_file and --interactive these are the values that a prompt does not set itself.
    """

    image: Path | None = option(
        None, "the picture to edit, for models that can; it is cut to the output's size"
    )
    image_width: int | None = option(None, f"width {_SIDE}")
    image_height: int | None = option(None, f"height {_SIDE}")
    steps: int = option(50, "steps of the sampler")
    cfg_trunc_ratio: float = option(1.0, "guide only while 1 - sigma is below this; 1 guides all the way")
    renorm_cfg: float = option(
        0.0, "bound of the guided prediction's norm, relative to the plain one; 0: none"
    )
    discrete_flow_shift: float = option(
        3.0, "shift of the sampler's steps towards noise", aliases=("scheduler_scale",)
    )

    def request(self) -> ImageRequest:
        """Return the picture that these options describe. Raises ConfigError for one that cannot be drawn."""
        return replace(super().request(), source=self.image)


@dataclass(frozen=True)
class Kandinsky5InferenceOptions(InferenceOptions):
    """All options of kandinsky5_minimal_inference.py."""

    models: Kandinsky5InferenceModelOptions
    picture: Kandinsky5PictureOptions
