"""Which weight files, and how the text is encoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.core.errors import ConfigError
from library.options.elsewhere import KANDINSKY5
from library.options.group import REQUIRED, OptionGroup, option

DEFAULT_TOKEN_LIMIT = 256


@dataclass(frozen=True, kw_only=True)
class TransformerOptions(OptionGroup):
    """The model that is trained."""

    pretrained_model_name_or_path: Path = option(
        REQUIRED, "the DiT: a .safetensors file, an index, or a folder"
    )
    disable_mmap_load_safetensors: bool = option(
        False, "read the DiT's file instead of mapping it into memory; faster on some network disks"
    )


@dataclass(frozen=True, kw_only=True)
class TextEncoderOptions(OptionGroup):
    """Text encoder."""

    elsewhere = KANDINSKY5

    gemma2: Path = option(REQUIRED, "the Gemma2 text encoder: a .safetensors file, an index, or a folder")
    gemma2_tokenizer: Path | None = option(
        None, "tokenizer.model, tokenizer.json or a folder with one; default: from inside or beside --gemma2"
    )
    tokenizer_cache_dir: Path | None = option(
        None, "hub cache folder, used only when no local tokenizer is found"
    )
    gemma2_max_token_length: int = option(DEFAULT_TOKEN_LIMIT, "captions are cut after this many tokens")
    system_prompt: str = option("", "put before every caption, followed by <Prompt Start>")

    def __post_init__(self) -> None:
        if self.gemma2_max_token_length < 1:
            raise ConfigError(
                f"--gemma2_max_token_length is {self.gemma2_max_token_length}; it must be 1 or more."
            )


@dataclass(frozen=True, kw_only=True)
class AutoencoderOptions(OptionGroup):
    """Autoencoder."""

    ae: Path = option(REQUIRED, "the FLUX autoencoder: a .safetensors file or a folder")
    no_half_vae: bool = option(False, "run the autoencoder in fp32 whatever --mixed_precision says")


@dataclass(frozen=True, kw_only=True)
class LuminaModelOptions(AutoencoderOptions, TextEncoderOptions, TransformerOptions):
    """Lumina Image 2.0 models.

    Weight files may be in the original, ComfyUI, all-in-one or diffusers layout; the layout is read from
    the file.
    """

    def __post_init__(self) -> None:
        TextEncoderOptions.__post_init__(self)
