"""One picture to be drawn: what the command line, a prompt file or an inline option can ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from library.core.errors import ConfigError

SIZE_STEP = 16  # pixels: the autoencoder's 8, times 2 for the transformer's patches
SAMPLERS = ("euler", "heun", "dpmsolver++")
# sd-scripts' names of samplers for models that predict noise. For Lumina it draws all of them with Euler.
NOISE_SAMPLERS = (
    *("ddim", "pndm", "lms", "euler_a", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsingle"),
    *("k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"),
)
DRAWN_WITH_EULER = "it is a sampler for models that predict noise; the pictures are drawn with euler"
MAX_STEPS = 1000  # the sampler's table has as many


@dataclass(frozen=True)
class ImageRequest:
    """Everything that decides a picture, given the models.

    width, height: pixels; None until they are chosen. seed: None until one is chosen. cfg_trunc_ratio:
    guidance acts while 1 - sigma is below it. renorm_cfg: bound of the guided velocity's norm, as a multiple
    of the conditional one's; 0 is no bound. sampler: one of SAMPLERS. lora_multipliers: () means those of the
    command line. source: the picture that is edited, for families that can.

    Raises:
        ConfigError: a value that cannot be drawn.
    """

    prompt: str = ""
    negative_prompt: str = ""
    width: int | None = 1024
    height: int | None = 1024
    steps: int = 36
    seed: int | None = None
    guidance_scale: float = 3.5
    cfg_trunc_ratio: float = 0.25
    renorm_cfg: float = 1.0
    discrete_flow_shift: float = 6.0
    sampler: str = "euler"
    lora_multipliers: tuple[float, ...] = ()
    source: Path | None = None

    def __post_init__(self) -> None:
        _check_side("image width", self.width)
        _check_side("image height", self.height)
        if not 1 <= self.steps <= MAX_STEPS:
            raise ConfigError(f"steps is {self.steps}; it must be from 1 to {MAX_STEPS}.")
        if self.sampler not in SAMPLERS:
            raise ConfigError(
                f"sampler '{self.sampler}' is not one for flow models; there are {', '.join(SAMPLERS)}."
            )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be from 0 to 2^63 - 1.")
        for name in ("guidance_scale", "cfg_trunc_ratio", "renorm_cfg"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value}; it must be 0 or more.")
        if not (math.isfinite(self.discrete_flow_shift) and self.discrete_flow_shift > 0):
            raise ConfigError(f"discrete_flow_shift is {self.discrete_flow_shift}; it must be above 0.")


def _check_side(name: str, pixels: int | None) -> None:
    if pixels is None or pixels >= SIZE_STEP and pixels % SIZE_STEP == 0:
        return
    below = pixels // SIZE_STEP * SIZE_STEP
    nearest = f"{below} and {below + SIZE_STEP}" if below > 0 else f"{SIZE_STEP} and up"
    raise ConfigError(f"{name} {pixels} is not a multiple of {SIZE_STEP}; the nearest are {nearest}.")
