"""What is changed about the noise that training pictures are mixed with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from library.core.errors import ConfigError
from library.options.group import OptionGroup, option


@dataclass(frozen=True, kw_only=True)
class NoiseOptions(OptionGroup):
    """Noise in training.

    The noise is plain Gaussian noise unless one of these changes it; sample pictures always start from that.
    """

    noise_offset: float | None = option(
        None, "add a random number of this size to each channel of the noise, to learn dark or bright ones"
    )
    noise_offset_random_strength: bool = option(
        False, "draw the strength of each picture's offset between 0 and --noise_offset"
    )
    adaptive_noise_scale: float | None = option(
        None, "add this times the channel's mean latent, without its sign, to --noise_offset"
    )
    multires_noise_iterations: int | None = option(
        None, "add noise of up to so many coarser resolutions, 6 to 10 for instance; 0 adds none"
    )
    multires_noise_discount: float = option(
        0.3, "strength of each coarser noise of --multires_noise_iterations, as a share of the one before"
    )
    ip_noise_gamma: float | None = option(
        None, "mix in so much more noise than the target tells of (input perturbation); 0.1 for instance"
    )
    ip_noise_gamma_random_strength: bool = option(
        False, "draw each picture's strength between 0 and --ip_noise_gamma"
    )

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.noise_offset is None and self.adaptive_noise_scale:
            raise ConfigError("--adaptive_noise_scale adds to --noise_offset; give that too (0 is possible).")

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag about noise that is not added."""
        yield from super().adjustments()
        needs = {
            "noise_offset_random_strength": "noise_offset",
            "ip_noise_gamma_random_strength": "ip_noise_gamma",
            "multires_noise_discount": "multires_noise_iterations",
        }
        for name, needed in needs.items():
            if not getattr(self, needed):
                yield from self.without_effect((name,), f"--{needed} is not given, or is 0")

    def _check_ranges(self) -> None:
        for name in ("noise_offset", "ip_noise_gamma", "multires_noise_iterations"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"--{name} is {value}; it must be 0 or more.")
        if self.adaptive_noise_scale is not None and not math.isfinite(self.adaptive_noise_scale):
            raise ConfigError(f"--adaptive_noise_scale is {self.adaptive_noise_scale}; it must be a number.")
        if not 0 <= self.multires_noise_discount <= 1:
            raise ConfigError(
                f"--multires_noise_discount is {self.multires_noise_discount}; it must be from 0 to 1."
            )
