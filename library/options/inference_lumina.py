"""Options of lumina_minimal_inference.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.core.errors import ConfigError
from library.options.elsewhere import KANDINSKY5
from library.options.group import REQUIRED, OptionGroup, option
from library.options.inference import DTYPES, InferenceOptions, PictureOptions
from library.options.model import DEFAULT_TOKEN_LIMIT


@dataclass(frozen=True, kw_only=True)
class LuminaInferenceModelOptions(OptionGroup):
    """Models.

    Weight files may be in the original, ComfyUI, all-in-one or diffusers layout.
    """

    elsewhere = KANDINSKY5

    pretrained_model_name_or_path: Path = option(
        REQUIRED, "the DiT: a .safetensors file, an index, or a folder"
    )
    gemma2_path: Path = option(
        REQUIRED, "the Gemma2 text encoder: a .safetensors file, an index, or a folder"
    )
    ae_path: Path = option(REQUIRED, "the FLUX autoencoder: a .safetensors file or a folder")
    gemma2_tokenizer: Path | None = option(
        None,
        "tokenizer.model, tokenizer.json or a folder with one; default: from inside or beside --gemma2_path",
    )
    tokenizer_cache_dir: Path | None = option(
        None, "hub cache folder, used only when no local tokenizer is found"
    )
    gemma2_max_token_length: int = option(DEFAULT_TOKEN_LIMIT, "prompts are cut after this many tokens")
    dtype: str = option("bf16", "precision of the DiT", choices=DTYPES)
    gemma2_dtype: str = option("bf16", "precision of the text encoder", choices=DTYPES)
    ae_dtype: str = option("bf16", "precision of the autoencoder", choices=DTYPES)

    def __post_init__(self) -> None:
        if self.gemma2_max_token_length < 1:
            raise ConfigError(
                f"--gemma2_max_token_length is {self.gemma2_max_token_length}; it must be 1 or more."
            )


@dataclass(frozen=True, kw_only=True)
class LuminaPictureOptions(PictureOptions):
    """Pictures.

    With --from_file and --interactive these are the values that a prompt does not set itself.
    """

    system_prompt: str = option("", "put before the prompt, followed by <Prompt Start>")
    add_system_prompt_to_negative_prompt: bool = option(False, "put it before the negative prompt as well")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.add_system_prompt_to_negative_prompt and not self.system_prompt:
            raise ConfigError("--add_system_prompt_to_negative_prompt needs --system_prompt.")


@dataclass(frozen=True)
class LuminaInferenceOptions(InferenceOptions):
    """All options of lumina_minimal_inference.py."""

    models: LuminaInferenceModelOptions
    picture: LuminaPictureOptions
