"""How the difference between prediction and target becomes a number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

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

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag of a Huber loss if that is not the loss."""
        yield from super().adjustments()
        if self.loss_type not in ("huber", "smooth_l1"):
            names = ("huber_schedule", "huber_c", "huber_scale")
            yield from self.without_effect(names, f"--loss_type is {self.loss_type}, not huber or smooth_l1")
