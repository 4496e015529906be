"""How noisy the training pictures are: the density of sigma."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from library.core.errors import ConfigError
from library.options.group import OptionGroup, option

SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift")
SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")
_DENSITIES = ("logit_normal", "mode")  # schemes that say how sigma is drawn, not how it is weighed
_READ_SIGMOID_SCALE = ("sigmoid", "shift", "flux_shift")
_OF_DENSITY = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}
_MAX_MODE_SCALE = 2 / (math.pi - 2)  # beyond it the "mode" density leaves [0, 1] (SD3 paper, section 3.1)


@dataclass(frozen=True, kw_only=True)
class TimestepOptions(OptionGroup):
    """Noise levels in training.

    sigma is the share of noise, from 0 (the picture) to 1 (noise only).
    """

    timestep_sampling: str = option(
        "shift",
        "how sigma is drawn; nextdit_shift is the recipe that Lumina was trained with",
        choices=SAMPLINGS,
    )
    discrete_flow_shift: float = option(
        6.0, "shift towards noise of the samplings 'shift' and 'sigma', and of sample pictures"
    )
    sigmoid_scale: float = option(
        1.0, "width of the normal draw of the samplings sigmoid, shift and flux_shift"
    )
    weighting_scheme: str = option(
        "uniform",
        "uniform (or none), logit_normal, mode: density of --timestep_sampling sigma; cosmap: loss weight",
        choices=SCHEMES,
    )
    logit_mean: float = option(0.0, "mean of --weighting_scheme logit_normal")
    logit_std: float = option(1.0, "standard deviation of --weighting_scheme logit_normal")
    mode_scale: float = option(1.29, "scale of --weighting_scheme mode")
    min_timestep: int | None = option(
        None, "train only on noise levels of at least this many thousandths (sigma * 1000)"
    )
    max_timestep: int | None = option(None, "train only on noise levels of at most this many thousandths")
    model_prediction_type: str = option(
        "raw",
        "what the prediction is compared with; raw: the velocity",
        choices=("raw", "additive", "sigma_scaled"),
    )

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The least and the greatest sigma that is trained on."""
        low = 0 if self.min_timestep is None else self.min_timestep
        high = 1000 if self.max_timestep is None else self.max_timestep
        return low / 1000, high / 1000

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.model_prediction_type != "raw":
            raise ConfigError(
                f"--model_prediction_type {self.model_prediction_type} would compare something else with the "
                "velocity, so that even a perfect model had a loss; use raw."
            )

    def _check_ranges(self) -> None:
        for name in ("discrete_flow_shift", "sigmoid_scale", "logit_std"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"--{name} is {value}; it must be above 0.")
        if not math.isfinite(self.logit_mean):
            raise ConfigError(f"--logit_mean is {self.logit_mean}; it must be a number.")
        low, high = self.sigma_range
        if not 0 <= low < high <= 1:
            raise ConfigError(
                f"--min_timestep {round(low * 1000)} and --max_timestep {round(high * 1000)} leave no noise "
                "level: they must be from 0 to 1000, the first below the second."
            )
        if not -1 <= self.mode_scale <= _MAX_MODE_SCALE:
            raise ConfigError(
                f"--mode_scale is {self.mode_scale}; it must be from -1 to {_MAX_MODE_SCALE:.4f}, outside of "
                "which the density leaves the range of sigma."
            )

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag that the chosen density does not read."""
        yield from super().adjustments()
        if self.weighting_scheme == "sigma_sqrt":
            yield (
                "--weighting_scheme sigma_sqrt has no effect: it makes the plain velocity loss of a loss on "
                "the predicted picture, and that is the loss here anyway"
            )
        if self.weighting_scheme in _DENSITIES and self.timestep_sampling != "sigma":
            yield (
                f"--weighting_scheme {self.weighting_scheme} has no effect: it is a density for "
                f"--timestep_sampling sigma, and sigma is drawn by {self.timestep_sampling}"
            )
        if self.timestep_sampling not in _READ_SIGMOID_SCALE:
            reason = f"only --timestep_sampling {' or '.join(_READ_SIGMOID_SCALE)} reads it"
            yield from self.without_effect(("sigmoid_scale",), reason)
        for name, scheme in _OF_DENSITY.items():
            if (self.timestep_sampling, self.weighting_scheme) != ("sigma", scheme):
                reason = f"only --timestep_sampling sigma with --weighting_scheme {scheme} reads it"
                yield from self.without_effect((name,), reason)
