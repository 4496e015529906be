"""Scheduled sampling: how often, and how far, the model itself walks to where a picture is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from library.core.errors import ConfigError
from library.options.group import OptionGroup, option

STRATEGIES = ("uniform", "biased_early", "biased_late")
SHAPES = ("linear", "cosine")
EULER = "euler"
SAMPLERS = (EULER, "unipc", "dpm", "rk4")  # those that other programs know

_OFFSET = "scheduled_sampling_max_step_offset"
_RAMP = "scheduled_sampling_ramp_steps"
_OF_RAMP = tuple(f"scheduled_sampling_{name}" for name in ("prob_start", "prob_end", "ramp_shape"))
_OF_REFLEXFLOW = tuple(f"scheduled_sampling_reflexflow_{name}" for name in ("alpha", "beta1", "beta2"))


@dataclass(frozen=True, kw_only=True)
class RolloutOptions(OptionGroup):
    """Scheduled sampling.

    Some pictures are trained where the model itself arrives when it walks there from more noise, and not on
    the straight path; see docs/scheduled_sampling.md. Off without --scheduled_sampling_max_step_offset.
    """

    scheduled_sampling_max_step_offset: int = option(
        0, "most steps that the model walks to the noise level of a picture; 0: scheduled sampling is off"
    )
    scheduled_sampling_step_size: float = option(
        0.02, "length of a step in sigma; 0.02 is a step of a sampler that makes 50 even ones"
    )
    scheduled_sampling_strategy: str = option(
        "uniform",
        "how the number of steps is drawn from 0 to the most; biased_early: rather few, biased_late: many",
        choices=STRATEGIES,
    )
    scheduled_sampling_probability: float = option(0.0, "share of the pictures that a number is drawn for")
    scheduled_sampling_prob_start: float = option(0.0, "that share where a ramp begins")
    scheduled_sampling_prob_end: float = option(0.5, "that share where a ramp ends")
    scheduled_sampling_ramp_steps: int = option(
        0, "training steps in which the share goes from its start to its end; 0: it is the same all the time"
    )
    scheduled_sampling_start_step: int = option(
        0, "training step at which the ramp begins or, without a ramp, scheduled sampling"
    )
    scheduled_sampling_ramp_shape: str = option("linear", "form of the ramp", choices=SHAPES)
    scheduled_sampling_sampler: str = option(
        EULER, "how the model walks; only euler can be used", choices=SAMPLERS
    )
    scheduled_sampling_order: int = option(1, "order of the sampler; Euler's method has 1")
    scheduled_sampling_reflexflow: bool = option(
        True, "correct the loss of these pictures by ReflexFlow (arXiv 2512.04904); false: the plain loss"
    )
    scheduled_sampling_reflexflow_alpha: float = option(
        1.0, "how much more the loss counts where the walk changed the prediction"
    )
    scheduled_sampling_reflexflow_beta1: float = option(
        10.0, "weight of the anti-drift term: the prediction should point away from the picture"
    )
    scheduled_sampling_reflexflow_beta2: float = option(1.0, "weight of the loss itself beside that term")

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.scheduled_sampling_sampler != EULER:
            raise ConfigError(
                f"--scheduled_sampling_sampler {self.scheduled_sampling_sampler} cannot be used here: the "
                f"model walks by Euler's method. Leave it out, and if steps shall be more exact, make them "
                f"smaller with --scheduled_sampling_step_size."
            )
        if self.scheduled_sampling_order != 1:
            raise ConfigError(
                f"--scheduled_sampling_order {self.scheduled_sampling_order} cannot be used here: Euler's "
                f"method, by which the model walks, has order 1. Leave it out."
            )

    @property
    def on(self) -> bool:
        """Whether a picture can be rolled out at all."""
        return self.scheduled_sampling_max_step_offset > 0 and max(self._shares) > 0

    @property
    def _shares(self) -> tuple[float, ...]:
        if self.scheduled_sampling_ramp_steps:
            return self.scheduled_sampling_prob_start, self.scheduled_sampling_prob_end
        return (self.scheduled_sampling_probability,)

    def _check_ranges(self) -> None:
        for name in ("max_step_offset", "ramp_steps", "start_step"):
            self._require(name, lambda value: value >= 0, "0 or more")
        for name in ("probability", "prob_start", "prob_end"):
            self._require(name, lambda value: 0 <= value <= 1, "from 0 to 1")
        for name in ("reflexflow_alpha", "reflexflow_beta1", "reflexflow_beta2"):
            self._require(name, lambda value: math.isfinite(value) and value >= 0, "0 or more")
        self._require("step_size", lambda value: 0 < value <= 1, "above 0 and at most 1")

    def _require(self, name: str, fits: Callable[[float], bool], wanted: str) -> None:
        value = getattr(self, f"scheduled_sampling_{name}")
        if not fits(value):
            raise ConfigError(f"--scheduled_sampling_{name} is {value}; it must be {wanted}.")

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag of something that is off."""
        yield from super().adjustments()
        if self.scheduled_sampling_max_step_offset == 0:
            names = [f.name for f in fields(self) if f.name != _OFFSET]
            yield from self.without_effect(names, f"--{_OFFSET} is not given, or is 0")
            return
        if not self.on:
            share = _OF_RAMP[1] if self.scheduled_sampling_ramp_steps else "scheduled_sampling_probability"
            yield from self.without_effect((_OFFSET,), f"--{share} is 0, so no picture is rolled out")
        if self.scheduled_sampling_ramp_steps == 0:
            yield from self.without_effect(_OF_RAMP, f"--{_RAMP} is not given, or is 0")
        else:
            reason = f"--{_RAMP} is given, so the share goes from --{_OF_RAMP[0]} to --{_OF_RAMP[1]}"
            yield from self.without_effect(("scheduled_sampling_probability",), reason)
        if not self.scheduled_sampling_reflexflow:
            yield from self.without_effect(_OF_REFLEXFLOW, "--scheduled_sampling_reflexflow is false")
