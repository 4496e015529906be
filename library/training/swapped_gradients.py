"""The gradients of a model some of whose blocks are swapped: those of their weights come home first."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from library.core.dist import Processes
from library.nn.gradient_return import GradientReturn
from library.training.gradients import PlainGradients


class SwappedGradients(PlainGradients):
    """Gradients of weights on the device, and on the CPU those of swapped blocks, which are stepped there."""

    def __init__(
        self, returned: GradientReturn, parameters: Iterable[nn.Parameter], device: torch.device
    ) -> None:
        """`parameters`: all that are trained, with those of `returned`. `device`: the main one."""
        super().__init__(parameters, device)
        self._returned = returned
        swapped = set(returned.parameters)
        self._others = [parameter for parameter in self._parameters if parameter not in swapped]

    def collect(self, processes: Processes) -> None:
        """Wait for what is on its way home, and sum all over the processes.

        Afterwards weights of swapped blocks are their master copies. Processes exchange on the device, one
        swapped weight's gradient after another.
        """
        self._returned.collect()
        if processes.world == 1:
            return
        processes.sum_gradients(self._others)
        for parameter in self._returned.parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = gradient.copy_(processes.sum(gradient.to(self._device)))

    def clear(self) -> None:
        """Let go of the gradients. Those on the CPU leave their memory for the next step's."""
        super().clear()
        self._returned.clear()
