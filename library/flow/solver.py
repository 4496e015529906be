"""From noise to a picture: Euler's method along the flow, for any velocity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def solve(
    velocity_at: VelocityAt,
    x_BCHW: Tensor,
    sigmas: Sequence[float],
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Follow the velocity from sigmas[0] to sigmas[-1] in Euler steps; `on_step` is called after each.

    The sigmas are Python numbers, so a step needs nothing from the device.
    """
    for sigma, following in pairwise(sigmas):
        x_BCHW = x_BCHW + (following - sigma) * velocity_at(x_BCHW, sigma)
        on_step()
    return x_BCHW
