"""A running average of what is trained, beside it."""

from __future__ import annotations

from dataclasses import dataclass

from library.core.errors import ConfigError
from library.options.group import OptionGroup, option
from library.options.sampling import SampleOptions


@dataclass(frozen=True, kw_only=True)
class EmaOptions(OptionGroup):
    """Running average (EMA).

    The average often draws better pictures than the weights of a single step. It is saved beside every file,
    as <name>-ema.
    """

    ema: bool = option(False, "keep an exponential moving average of what is trained and save it too")
    ema_decay: float = option(
        0.995, "share of the average that a step keeps; it averages over about 1 / (1 - decay) steps"
    )
    ema_every_n_steps: int = option(
        1, "update the average every N steps, with decay^N, so that it averages over the same time"
    )
    ema_sample: str = option("raw", "which weights draw the sample pictures", choices=("raw", "ema", "both"))

    def __post_init__(self) -> None:
        if not 0 < self.ema_decay < 1:
            raise ConfigError(f"--ema_decay is {self.ema_decay}; it must lie between 0 and 1.")
        if self.ema_every_n_steps < 1:
            raise ConfigError(f"--ema_every_n_steps is {self.ema_every_n_steps}; it must be 1 or more.")
        for name, default in (("ema_decay", 0.995), ("ema_every_n_steps", 1), ("ema_sample", "raw")):
            if not self.ema and getattr(self, name) != default:
                raise ConfigError(f"--{name} is given without --ema, so there is no average; add --ema.")

    def check_samples(self, sampling: SampleOptions) -> None:
        """Raise ConfigError if the average should draw sample pictures and none are asked for."""
        if self.ema_sample != "raw" and not sampling.scheduled:
            raise ConfigError(
                f"--ema_sample {self.ema_sample} has no sample pictures to draw: add --sample_prompts, and "
                "--sample_every_n_epochs, --sample_every_n_steps or --sample_at_first."
            )
