"""Which weight files of Kandinsky 5.0 Image, and how text and pictures are encoded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.core.errors import ConfigError
from library.options.elsewhere import LUMINA
from library.options.group import REQUIRED, OptionGroup, option
from library.options.model import TransformerOptions

T2I, I2I = "t2i", "i2i"
# What users of other tools write: the families' names of checkpoints, and musubi-tuner's of tasks.
_TASKS = {
    "auto": None,
    T2I: T2I,
    I2I: I2I,
    "t2i-lite-sft": T2I,
    "t2i-lite-pretrain": T2I,
    "i2i-lite-sft": I2I,
    "i2i-lite-pretrain": I2I,
    "k5-lite-t2i-hd": T2I,
    "k5-lite-i2i-hd": I2I,
}
TASKS = tuple(_TASKS)
QWEN_TOKENS, EDIT_CROP = 512, 55
EDIT_CROPS = ("55", "52")


def task_named(name: str) -> str | None:
    """Return "t2i" or "i2i" for a name of a task; None where the model's file decides."""
    return _TASKS[name]


@dataclass(frozen=True, kw_only=True)
class Kandinsky5EncoderOptions(OptionGroup):
    """Text encoders."""

    elsewhere = LUMINA

    text_encoder_qwen: Path = option(
        REQUIRED, "the Qwen2.5-VL 7B text encoder: a .safetensors file, an index, or a folder"
    )
    text_encoder_clip: Path = option(REQUIRED, "the CLIP-L text encoder: a .safetensors file or a folder")
    qwen_tokenizer: Path | None = option(
        None, "Qwen's tokenizer.json, or a folder with it; default: beside --text_encoder_qwen"
    )
    clip_tokenizer: Path | None = option(
        None, "CLIP's tokenizer.json, or a folder with it; default: beside --text_encoder_clip"
    )
    tokenizer_cache_dir: Path | None = option(
        None, "hub cache folder, used only when no local tokenizer is found"
    )
    qwen_max_token_length: int = option(QWEN_TOKENS, "captions are cut after this many of Qwen's tokens")
    edit_prompt_crop: str = option(
        str(EDIT_CROP),
        "tokens of the image-to-image template that are dropped: 55, as the model was trained, which drops "
        "the first three tokens of the caption too; 52 keeps them",
        choices=EDIT_CROPS,
    )
    stream_text_encoder: bool = option(
        False,
        "keep Qwen in the computer's memory and bring it to the device layer by layer, for all captions at "
        "once: for small cards",
    )

    def __post_init__(self) -> None:
        if not 1 <= self.qwen_max_token_length <= QWEN_TOKENS:
            raise ConfigError(
                f"--qwen_max_token_length is {self.qwen_max_token_length}; it must be from 1 to "
                f"{QWEN_TOKENS}, which is what the model was trained with."
            )


@dataclass(frozen=True, kw_only=True)
class Kandinsky5AutoencoderOptions(OptionGroup):
    """Autoencoder."""

    vae: Path = option(REQUIRED, "the FLUX autoencoder: a .safetensors file or a folder", aliases=("ae",))
    no_half_vae: bool = option(False, "run the autoencoder in fp32 whatever --mixed_precision says")


@dataclass(frozen=True, kw_only=True)
class Kandinsky5TransformerOptions(TransformerOptions):
    """The model that is trained."""

    pretrained_model_name_or_path: Path = option(
        REQUIRED, "the DiT: a .safetensors file, an index, or a folder", aliases=("dit",)
    )
    task: str = option(
        "auto",
        "t2i draws from text, i2i edits a picture; auto reads it from the DiT's file, the other names are "
        "those of other tools",
        choices=TASKS,
    )


@dataclass(frozen=True, kw_only=True)
class Kandinsky5ModelOptions(
    Kandinsky5AutoencoderOptions, Kandinsky5EncoderOptions, Kandinsky5TransformerOptions
):
    """Kandinsky 5.0 Image models.

    Weight files may be single files (as published, or for ComfyUI) or folders of diffusers; the layout is
    read from the file.
    """

    scheduler_scale: float = option(3.0, "shift of the sampler's steps towards noise, for sample pictures")
    source_dropout_rate: float = option(
        0.0, "probability of training an image-to-image pair without its source picture, from text alone"
    )

    def __post_init__(self) -> None:
        Kandinsky5EncoderOptions.__post_init__(self)
        if not (math.isfinite(self.scheduler_scale) and self.scheduler_scale > 0):
            raise ConfigError(f"--scheduler_scale is {self.scheduler_scale}; it must be above 0.")
        if not 0 <= self.source_dropout_rate <= 1:
            raise ConfigError(f"--source_dropout_rate is {self.source_dropout_rate}; it must be from 0 to 1.")

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag that has nothing to do with pictures from text alone."""
        yield from super().adjustments()
        if task_named(self.task) == T2I:
            yield from self.without_sources(f"--task {self.task} has no source pictures")

    def without_sources(self, reason: str) -> Iterator[str]:
        """Yield a sentence for each flag about source pictures, where there are none."""
        return self.without_effect(("source_dropout_rate", "edit_prompt_crop"), reason)
