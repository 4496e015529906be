"""How the processes of a run stop in the same step: they vote with the numbers that they exchange anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from library.core.device import sent


class StopVote:
    """Whether a process of several was asked to stop: they find out together in each step, and then all know.

    `reason` says why this one was asked, or None.
    """

    shared = True

    def __init__(self, reason: Callable[[], str | None], device: torch.device) -> None:
        self._reason, self._device = reason, device
        self.wished = False  # by one of them, in the last step

    def measure(self, step: int) -> Tensor:
        """Return this process's vote."""
        return sent(torch.tensor([float(self._reason() is not None)]), self._device)

    def named(self, numbers: Sequence[float]) -> dict[str, float]:
        """Remember the result, which is nothing for the log."""
        self.wished = numbers[0] > 0
        return {}
