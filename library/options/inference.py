"""Options of lumina_minimal_inference.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from library.core.errors import ConfigError
from library.options.attention import AttentionOptions
from library.options.group import REQUIRED, OptionGroup, option
from library.options.model import DEFAULT_TOKEN_LIMIT
from library.options.quant import QuantOptions
from library.options.request import SAMPLERS, ImageRequest

DEFAULT_PROMPT = "A beautiful sunset over the mountains"
DTYPES = ("bf16", "fp16", "fp32", "bfloat16", "float16", "float32", "float")


@dataclass(frozen=True)
class LoraWeight:
    """A LoRA file and how strongly it acts."""

    path: Path
    multiplier: float = 1.0


def parse_lora_weight(word: str) -> LoraWeight:
    """Read `path` or `path;multiplier`. In a path with semicolons, a number behind the last one counts."""
    path, semicolon, tail = word.rpartition(";")
    if not semicolon or Path(word).exists():
        return LoraWeight(Path(word))
    try:
        multiplier = float(tail)
    except ValueError:
        return LoraWeight(Path(word))
    return LoraWeight(Path(path), multiplier) if math.isfinite(multiplier) else LoraWeight(Path(word))


@dataclass(frozen=True, kw_only=True)
class InferenceModelOptions(OptionGroup):
    """Models.

    Weight files may be in the original, ComfyUI, all-in-one or diffusers layout.
    """

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
    device: str | None = option(None, "device such as cuda, cuda:1, mps or cpu; default: the best there is")
    offload: bool = option(False, "keep each model on the device only while it is used")
    lora_weights: tuple[LoraWeight, ...] = option(
        (),
        "LoRA files, each as path or path;multiplier",
        nargs="*",
        parse=parse_lora_weight,
        metavar="PATH[;MULTIPLIER]",
    )
    merge_lora_weights: bool = option(False, "add the LoRAs to the weights once, instead of at every step")

    def __post_init__(self) -> None:
        if self.gemma2_max_token_length < 1:
            raise ConfigError(
                f"--gemma2_max_token_length is {self.gemma2_max_token_length}; it must be 1 or more."
            )
        if self.merge_lora_weights and not self.lora_weights:
            raise ConfigError("--merge_lora_weights needs --lora_weights.")


@dataclass(frozen=True, kw_only=True)
class PictureOptions(OptionGroup):
    """Pictures.

    With --from_file and --interactive these are the values that a prompt does not set itself.
    """

    prompt: str = option(DEFAULT_PROMPT, "what to draw")
    negative_prompt: str = option("", "what to draw away from")
    image_width: int = option(1024, "width in pixels, a multiple of 16")
    image_height: int = option(1024, "height in pixels, a multiple of 16")
    steps: int = option(36, "steps of the sampler")
    seed: int | None = option(None, "seed of the noise; default: a random one, which the file name tells")
    guidance_scale: float = option(3.5, "strength of classifier-free guidance; 1 is none, and twice as fast")
    cfg_trunc_ratio: float = option(0.25, "guide only while 1 - sigma is below this; 1 guides all the way")
    renorm_cfg: float = option(
        1.0, "bound of the guided prediction's norm, relative to the plain one; 0: none"
    )
    discrete_flow_shift: float = option(6.0, "shift of the sampler's steps towards noise")
    sampler: str = option(
        "euler", "euler; heun, which asks the model twice a step; dpmsolver++ (2M)", choices=SAMPLERS
    )
    system_prompt: str = option("", "put before the prompt, followed by <Prompt Start>")
    add_system_prompt_to_negative_prompt: bool = option(False, "put it before the negative prompt as well")

    def __post_init__(self) -> None:
        self.request()
        if self.add_system_prompt_to_negative_prompt and not self.system_prompt:
            raise ConfigError("--add_system_prompt_to_negative_prompt needs --system_prompt.")

    def request(self) -> ImageRequest:
        """Return the picture that these options describe. Raises ConfigError for one that cannot be drawn."""
        return ImageRequest(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=self.image_width,
            height=self.image_height,
            steps=self.steps,
            seed=self.seed,
            guidance_scale=self.guidance_scale,
            cfg_trunc_ratio=self.cfg_trunc_ratio,
            renorm_cfg=self.renorm_cfg,
            discrete_flow_shift=self.discrete_flow_shift,
            sampler=self.sampler,
        )


@dataclass(frozen=True, kw_only=True)
class InferenceRunOptions(OptionGroup):
    """Where prompts come from and pictures go."""

    output_dir: Path = option(Path("outputs"), "folder for image_<time>_<seed>.png")
    interactive: bool = option(False, "ask for prompts, with options behind them, until 'exit'")
    from_file: Path | None = option(
        None, "draw every prompt of a file: .txt one a line with options behind it, .toml or .json"
    )

    def __post_init__(self) -> None:
        if self.interactive and self.from_file is not None:
            raise ConfigError("--interactive and --from_file both say where prompts come from; give one.")


@dataclass(frozen=True, kw_only=True)
class LuminaInferenceOptions:
    """All options of lumina_minimal_inference.py."""

    models: InferenceModelOptions
    attention: AttentionOptions
    quant: QuantOptions
    picture: PictureOptions
    run: InferenceRunOptions

    def __post_init__(self) -> None:
        if self.run.from_file is not None and self.picture.prompt != DEFAULT_PROMPT:
            raise ConfigError("--prompt and --from_file both say what to draw; give one.")
