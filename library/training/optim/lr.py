"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state.

The curves are those of transformers' schedulers of the same names (piecewise_constant: diffusers'), with
sd-scripts' meaning of the settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from library.core.errors import ConfigError
from library.options.optimizer import OptimizerOptions

Multiplier = Callable[[int], float]
Schedule = Callable[[int, Sequence[float]], Sequence[float]]
_POLYNOMIAL_END = 1e-7  # transformers' `lr_end`: an absolute rate, not a share


def learning_rate_schedule(options: OptimizerOptions, total_steps: int) -> Schedule:
    """Return the function from optimizer step (the first is 0) and peak rates to rates.

    Raises:
        ConfigError: warm-up and decay are longer than the run, or `--lr_scheduler_type` cannot be used.
    """
    options = options.in_effect()
    if options.lr_scheduler_type:
        from library.training.optim.lr_class import (
            ClassSchedule,
        )  # it imports torch, and this file is read without

        return ClassSchedule(options)
    multiplier = lr_multiplier(options, total_steps)
    return lambda step, peaks: [peak * multiplier(step) for peak in peaks]


def lr_multiplier(options: OptimizerOptions, total_steps: int) -> Multiplier:
    """Return the function from optimizer step (the first is 0) to the factor on the peak learning rate.

    Raises:
        ConfigError: warm-up and decay together are longer than the run.
    """
    options = options.in_effect()
    warmup = _steps(options.lr_warmup_steps, total_steps)
    decay = _steps(options.lr_decay_steps, total_steps)
    if warmup + decay > total_steps:
        raise ConfigError(
            f"--lr_warmup_steps ({warmup} steps) and --lr_decay_steps ({decay}) are longer than the run of "
            f"{total_steps} steps."
        )
    after = _after_warmup(options, warmup, decay, total_steps)
    if options.lr_scheduler == "cosine_warmup_with_min_lr":
        return lambda step: (step + 1) / warmup if step < warmup else after(step)
    if options.lr_scheduler == "warmup_stable_decay":
        lowest = options.lr_scheduler_min_lr_ratio or 0.0
        return lambda step: lowest + (1 - lowest) * step / warmup if step < warmup else after(step)
    return lambda step: step / warmup if step < warmup else after(step)


def _steps(steps_or_share: int | float, total_steps: int) -> int:
    """Shares of the run are floats."""
    return int(steps_or_share * total_steps) if isinstance(steps_or_share, float) else steps_or_share


def _after_warmup(options: OptimizerOptions, warmup: int, decay: int, total: int) -> Multiplier:
    """The curve from step `warmup` on."""
    falling = max(1, total - warmup)
    lowest = options.lr_scheduler_min_lr_ratio or 0.0
    cycles = options.lr_scheduler_num_cycles

    def inverse_sqrt(step: int) -> float:
        timescale = options.lr_scheduler_timescale or warmup or 10_000
        return 1 / math.sqrt((step + timescale - warmup) / timescale)

    def polynomial(step: int) -> float:
        end = _POLYNOMIAL_END / options.network_lr
        remaining = max(0.0, 1 - (step - warmup) / falling)
        return (1 - end) * remaining**options.lr_scheduler_power + end

    def restarts(step: int) -> float:
        progress = (step - warmup) / falling
        return 0.0 if progress >= 1 else _half_wave(cycles * progress % 1.0)

    def stable_then_decay(step: int) -> float:
        progress = (step - (total - decay)) / max(1, decay)
        if progress < 0:
            return 1.0
        return lowest if progress >= 1 else lowest + (1 - lowest) * _half_wave(cycles * progress)

    def cosine_to_lowest(step: int) -> float:
        return lowest + (1 - lowest) * _half_wave(cycles * (step - warmup) / falling)

    def piecewise(step: int) -> float:
        return next(factor for factor, end in options.step_rules() if end is None or step < end)

    curves: dict[str, Multiplier] = {
        "constant": lambda step: 1.0,
        "adafactor": lambda step: 1.0,
        "piecewise_constant": piecewise,
        "constant_with_warmup": lambda step: 1.0,
        "linear": lambda step: max(0.0, (total - step) / falling),
        "cosine": lambda step: _half_wave((step - warmup) / falling),
        "cosine_with_restarts": restarts,
        "polynomial": polynomial,
        "inverse_sqrt": inverse_sqrt,
        "cosine_with_min_lr": cosine_to_lowest,
        "cosine_warmup_with_min_lr": lambda step: cosine_to_lowest(step + 1),
        "warmup_stable_decay": stable_then_decay,
    }
    return curves[options.lr_scheduler]


def _half_wave(progress: float) -> float:
    """A cosine from 1 at 0 to 0 at 1 (and up again to 1 at 2)."""
    return 0.5 * (1 + math.cos(math.pi * progress))
