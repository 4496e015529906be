"""From noise to a picture: Euler's, Heun's and DPM-Solver's methods along the flow, for any velocity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from library.flow.timesteps import TABLE_SIZE, shift

VelocityAt = Callable[[Tensor, float], Tensor]  # (x_BCHW, sigma) -> velocity_BCHW


def sampler_sigmas(steps: int, factor: float) -> list[float]:
    """Return the steps + 1 sigmas of the sampler, from 1 to 0.

    They are those of diffusers' `FlowMatchEulerDiscreteScheduler(shift=factor)`: evenly spaced from 1 to the
    smallest sigma of the training table, which is shifted already, and then shifted once more.
    """
    smallest = shift(1 / TABLE_SIZE, factor)
    even = [1 - (1 - smallest) * i / (steps - 1) for i in range(steps)] if steps > 1 else [1.0]
    return [shift(sigma, factor) for sigma in even] + [0.0]


def shifted_sigmas(steps: int, factor: float) -> list[float]:
    """Return the steps + 1 sigmas of Kandinsky's sampler: evenly spaced from 1 to 0, then shifted."""
    return [shift(1 - i / steps, factor) for i in range(steps + 1)]


def solve(
    velocity_at: VelocityAt,
    x_BCHW: Tensor,
    sigmas: Sequence[float],
    on_step: Callable[[], object] = lambda: None,
    *,
    sampler: str = "euler",
) -> Tensor:
    """Follow the velocity from sigmas[0] to sigmas[-1]; `on_step` is called after each step.

    The sigmas are Python numbers, so a step needs nothing from the device.
    """
    last_BCHW = x_BCHW
    for after_BCHW in _SAMPLERS[sampler](velocity_at, x_BCHW, sigmas):
        last_BCHW = after_BCHW
        on_step()
    return last_BCHW


def _euler(velocity_at: VelocityAt, x_BCHW: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """Yield x after each step along the velocity at the step's beginning: order 1."""
    for sigma, following in pairwise(sigmas):
        x_BCHW = x_BCHW + (following - sigma) * velocity_at(x_BCHW, sigma)
        yield x_BCHW


def _heun(velocity_at: VelocityAt, x_BCHW: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """Yield x after each step along the mean of the velocities at its beginning and at Euler's end: order 2.

    The last step is Euler's: its end is the clean picture, where models are not trained.
    """
    for sigma, following in pairwise(sigmas):
        velocity_BCHW = velocity_at(x_BCHW, sigma)
        if following > 0:
            ahead_BCHW = velocity_at(x_BCHW + (following - sigma) * velocity_BCHW, following)
            velocity_BCHW = (velocity_BCHW + ahead_BCHW) / 2
        x_BCHW = x_BCHW + (following - sigma) * velocity_BCHW
        yield x_BCHW


def _dpm_solver(velocity_at: VelocityAt, x_BCHW: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """Yield x after each step of DPM-Solver++(2M): order 2 from one velocity a step (arXiv 2211.01095, 4).

    Its time is lambda = log((1 - sigma) / sigma), which is infinite at both ends; next to them a step has
    order 1, and is then the same as Euler's.
    """
    clean_BCHW = last_log_ratio = None
    for sigma, following in pairwise(sigmas):
        before_BCHW, clean_BCHW = clean_BCHW, x_BCHW - sigma * velocity_at(x_BCHW, sigma)
        estimate_BCHW = clean_BCHW
        if before_BCHW is not None and last_log_ratio is not None and following > 0:
            ratio = _log_ratio(following, sigma) / last_log_ratio
            estimate_BCHW = clean_BCHW + ratio / 2 * (clean_BCHW - before_BCHW)
        x_BCHW = following / sigma * x_BCHW + (1 - following / sigma) * estimate_BCHW
        last_log_ratio = _log_ratio(following, sigma) if 0 < following and sigma < 1 else None
        yield x_BCHW


def _log_ratio(following: float, sigma: float) -> float:
    """The step in lambda from sigma to `following`, both inside (0, 1)."""
    return math.log((1 - following) / following) - math.log((1 - sigma) / sigma)


_SAMPLERS = {"euler": _euler, "heun": _heun, "dpmsolver++": _dpm_solver}
