"""Options that every family's inference script has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from library.core.errors import ConfigError
from library.options.attention import AttentionOptions
from library.options.group import OptionGroup, option
from library.options.quant import QuantOptions
from library.options.request import SAMPLERS, ImageRequest
from library.options.swap import SwapOptions

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
class LoraOptions(OptionGroup):
    """LoRAs."""

    lora_weights: tuple[LoraWeight, ...] = option(
        (),
        "LoRA files, each as path or path;multiplier",
        nargs="*",
        parse=parse_lora_weight,
        metavar="PATH[;MULTIPLIER]",
    )
    merge_lora_weights: bool = option(False, "add the LoRAs to the weights once, instead of at every step")

    def __post_init__(self) -> None:
        if self.merge_lora_weights and not self.lora_weights:
            raise ConfigError("--merge_lora_weights needs --lora_weights.")

    @property
    def multipliers(self) -> tuple[float, ...]:
        """How strongly each LoRA acts, unless a prompt says otherwise."""
        return tuple(lora.multiplier for lora in self.lora_weights)


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(OptionGroup):
    """Where models lie, and how much goes through them at once."""

    device: str | None = option(None, "device such as cuda, cuda:1, mps or cpu; default: the best there is")
    offload: bool = option(False, "keep each model on the device only while it is used")
    sequential_cfg: bool = option(
        False, "let prompt and negative prompt go through the DiT one after the other: less memory"
    )


@dataclass(frozen=True, kw_only=True)
class PictureOptions(OptionGroup):
    """Pictures.

    With --from_file and --interactive these are the values that a prompt does not set itself.
    """

    prompt: str = option(DEFAULT_PROMPT, "what to draw")
    negative_prompt: str = option("", "what to draw away from")
    image_width: int | None = option(1024, "width in pixels, a multiple of 16")
    image_height: int | None = option(1024, "height in pixels, a multiple of 16")
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

    def __post_init__(self) -> None:
        self.request()

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


@dataclass(frozen=True)
class InferenceOptions:
    """What every family's inference script can be told; a family says what its models are."""

    models: OptionGroup
    picture: PictureOptions
    run: InferenceRunOptions
    loras: LoraOptions
    where: DeviceOptions
    swap: SwapOptions
    quant: QuantOptions
    attention: AttentionOptions

    def __post_init__(self) -> None:
        if self.run.from_file is not None and self.picture.prompt != DEFAULT_PROMPT:
            raise ConfigError("--prompt and --from_file both say what to draw; give one.")

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag that is given but has no effect, with the reason."""
        for f in fields(self):
            yield from getattr(self, f.name).adjustments()
        if self.run.from_file is None and not self.run.interactive and self.picture.guidance_scale == 1:
            reason = "--guidance_scale 1 does not guide"
            yield from self.picture.without_effect(("negative_prompt",), reason)
