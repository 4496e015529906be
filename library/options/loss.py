"""How the difference between prediction and target becomes a number."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from library.core.errors import ConfigError
from library.options.group import OptionGroup, option


@dataclass(frozen=True, kw_only=True)
class LossOptions(OptionGroup):
    """Loss."""

    loss_type: str = option("l2", "loss on the velocity", choices=("l2", "l1", "huber", "smooth_l1"))
    huber_schedule: str = option(
        "snr",
        "how the Huber threshold falls from huber_scale at sigma 0 towards huber_c * huber_scale at sigma 1: "
        "constant (huber_c everywhere), exponential, or snr (with the squared share of signal)",
        choices=("constant", "exponential", "snr"),
    )
    huber_c: float = option(0.1, "Huber threshold at full noise: L1 far above it, L2 far below")
    huber_scale: float = option(1.0, "factor on the Huber threshold")

    def __post_init__(self) -> None:
        for name in ("huber_c", "huber_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"--{name} is {value}; it must be above 0.")
        if self.loss_type in ("huber", "smooth_l1"):
            return
        for f in fields(self):
            if f.name.startswith("huber_") and getattr(self, f.name) != f.default:
                raise ConfigError(
                    f"--{f.name} has no effect on --loss_type {self.loss_type}; use huber or smooth_l1."
                )
