"""What happens between steps: each event says when it is due and what it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol


@dataclass(frozen=True)
class Moment:
    """A point between two steps. `step` and `epoch` count what is done, so both are 0 before training."""

    step: int
    epoch: int
    epoch_ended: bool
    run_ended: bool


class Event(Protocol):
    """Something that may happen at a moment, and must not touch the randomness of training.

    `shared`: every process runs it at the same time; otherwise the main one does, and the others wait.
    """

    shared: ClassVar[bool]

    def due(self, moment: Moment) -> bool:
        """Whether to run now."""

    def run(self, moment: Moment) -> None:
        """Do it."""


@dataclass(frozen=True)
class Interval:
    """Every N steps, every N epochs, or both; None switches a side off."""

    steps: int | None = None
    epochs: int | None = None

    def hits(self, moment: Moment) -> bool:
        """Whether the interval ends at this moment; never before the first step."""
        if moment.step == 0:
            return False
        by_step = self.steps is not None and moment.step % self.steps == 0
        by_epoch = self.epochs is not None and moment.epoch_ended and moment.epoch % self.epochs == 0
        return by_step or by_epoch
