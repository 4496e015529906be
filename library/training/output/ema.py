"""An exponential moving average of trained parameters.

    average <- d * average + (1 - d) * parameter

with d = `decay`, but in the beginning at most (1 + step) / (10 + step), so that the start weights are soon
forgotten. Where the average is updated every k steps only, d is the product of those k steps' factors, and
the average forgets as fast as with an update at every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from library.core.errors import CheckpointError
from library.options.ema import EmaOptions


def decay_at(step: int, decay: float) -> float:
    """Return the share of the average that step number `step` (from 1) keeps."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """The fp32 average of named parameters, kept beside them on their device."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], options: EmaOptions) -> None:
        self._parameters = dict(parameters)
        self._decay, self._every = options.ema_decay, options.ema_every_n_steps
        self._average = {name: _copy(p) for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters in after `step` steps, if an update is due then."""
        if step % self._every:
            return
        steps = range(step - self._every + 1, step + 1)
        keep = math.prod(decay_at(number, self._decay) for number in steps)
        averages = list(self._average.values())
        torch._foreach_lerp_(averages, [p.float() for p in self._parameters.values()], 1.0 - keep)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the parameters hold the average for a while; afterwards they are what they were, to the bit."""
        originals = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            self._put(self._average)
            yield
        finally:
            self._put(originals)

    def export_state(self) -> dict[str, Tensor]:
        """Return copies of the average on the CPU, by parameter name."""
        return {name: average.to("cpu", copy=True) for name, average in self._average.items()}

    def import_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over an average that `export_state` returned.

        Raises:
            CheckpointError: it is of another network.
        """
        shapes = {name: average.shape for name, average in self._average.items()}
        if shapes != {name: tensor.shape for name, tensor in state.items()}:
            raise CheckpointError("The saved running average (EMA) belongs to a network of another shape.")
        for name, average in self._average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


def _copy(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to(torch.float32, copy=True)
