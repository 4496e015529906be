"""An exponential moving average of trained parameters.

    average <- d * average + (1 - d) * parameter

with d = `decay`, but in the beginning at most (1 + step) / (10 + step), so that the start weights are soon
forgotten. Where the average is updated every k steps only, d is the product of those k steps' factors, and
the average forgets as fast as with an update at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from library.core.errors import CheckpointError
from library.options.ema import EmaOptions


_AT_ONCE = 1 << 26  # numbers that are made fp32 at a time


def decay_at(step: int, decay: float) -> float:
    """Return the share of the average that step number `step` (from 1) keeps."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """The fp32 average of named parameters, kept beside them on their device."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        options: EmaOptions,
        *,
        settle: Callable[[], None] = lambda: None,
        exact: Callable[[nn.Parameter], Tensor] = Tensor.detach,
    ) -> None:
        """`settle` and `exact`: see `Learner`."""
        self._parameters = dict(parameters)
        self._settle, self._exact = settle, exact
        self._decay, self._every = options.ema_decay, options.ema_every_n_steps
        self._average = {name: _copy(p) for name, p in self._parameters.items()}
        self._pieces = list(_pieces(self._average))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters in after `step` steps, if an update is due then."""
        if step % self._every:
            return
        steps = range(step - self._every + 1, step + 1)
        keep = math.prod(decay_at(number, self._decay) for number in steps)
        for names in self._pieces:
            averages = [self._average[name] for name in names]
            weights = [self._exact(self._parameters[name]).float() for name in names]
            torch._foreach_lerp_(averages, weights, 1.0 - keep)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the parameters hold the average for a while; afterwards they are what they were, to the bit."""
        self._settle()
        originals = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            self._put(self._average)
            yield
        finally:
            self._settle()
            self._put(originals)

    def average(self, name: str) -> Tensor:
        """Return the average of a parameter, fp32; not to be changed."""
        return self._average[name]

    def export_state(self) -> dict[str, Tensor]:
        """Return the average by parameter name, as it is and where it is: to be written before it goes on."""
        return dict(self._average)

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


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield the names of tensors that are taken in together: all of a network, a few of a whole model."""
    names: list[str] = []
    for name, tensor in tensors.items():
        if names and sum(tensors[other].numel() for other in names) + tensor.numel() > _AT_ONCE:
            yield names
            names = []
        names.append(name)
    if names:
        yield names


def _copy(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to(torch.float32, copy=True)
