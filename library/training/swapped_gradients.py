"""The gradients of a model some of whose blocks are swapped: those of their weights come home first."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from library.core.dist import Processes
from library.nn.swap.gradient_return import GradientReturn
from library.training.gradients import PlainGradients


class SwappedGradients(PlainGradients):
    """Gradients of weights on the device, and on the CPU those of swapped blocks, which are stepped there."""

    def __init__(
        self, returned: GradientReturn, parameters: Iterable[nn.Parameter], device: torch.device
    ) -> None:
        """`parameters`: all that are trained, with those of `returned`. `device`: the main one."""
        super().__init__(parameters, device)
        self._returned = returned

    def collect(self, processes: Processes) -> None:
        """Wait for what is on its way home, and sum all over the processes.

        Afterwards weights of swapped blocks are their master copies.
        """
        self._returned.collect()
        super().collect(processes)

    def clear(self) -> None:
        """Let go of the gradients. Those on the CPU leave their memory for the next step's."""
        super().clear()
        self._returned.clear()

    def close(self) -> None:
        """Watch no more: gradients stay where autograd makes them."""
        self._returned.close()
