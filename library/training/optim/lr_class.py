"""`--lr_scheduler_type`: any scheduler class as a function of the step.

The scheduler works on an optimizer that has rates and nothing else, once from the first step on, and what it
did is kept. So a resumed run asks for the rate of its step like a fresh one, and nothing has to be saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from library.core.errors import ConfigError
from library.options.optimizer import OptimizerOptions
from library.training.optim.optimizer import check_settings, import_class

_FLAG = "--lr_scheduler_type"

Result = TypeVar("Result")


class ClassSchedule:
    """The rates that a scheduler class gives, by step (the first is 0) and the groups' peak rates.

    Raises:
        ConfigError: the class is not there, follows the loss, or does not take its settings.
    """

    def __init__(self, options: OptimizerOptions) -> None:
        self._name = options.lr_scheduler_type
        path = self._name if "." in self._name else f"torch.optim.lr_scheduler.{self._name}"
        self._kind = import_class(path, LRScheduler, _FLAG)
        self._settings = options.scheduler_settings()
        if issubclass(self._kind, ReduceLROnPlateau):
            raise ConfigError(
                f"{_FLAG} {self._name} follows the loss, and rates here are functions of the step, so that a "
                "run can be resumed exactly. Use --lr_scheduler cosine or another of its names."
            )
        check_settings(self._kind, self._settings, "--lr_scheduler_args")
        self._start([options.learning_rate])  # a mistake in the settings shows now

    def __call__(self, step: int, peaks: Sequence[float]) -> Sequence[float]:
        """Return each group's rate at `step`."""
        if list(peaks) != self._peaks:
            self._start(peaks)
        while len(self._rates) <= step:
            self._optimizer.step()
            self._try(self._scheduler.step)
            self._rates.append(_rates(self._optimizer))
        return self._rates[step]

    def _start(self, peaks: Sequence[float]) -> None:
        self._peaks = list(peaks)
        self._optimizer = _RatesOnly(peaks)
        self._scheduler = self._try(lambda: self._kind(self._optimizer, **self._settings))
        self._rates = [_rates(self._optimizer)]

    def _try(self, action: Callable[[], Result]) -> Result:
        """Say what a scheduler has against its settings; it may have it at the start or at a step."""
        try:
            return action()
        except (TypeError, ValueError, AttributeError) as error:
            hint = (
                " Only the rate is scheduled: give cycle_momentum=False." if "momentum" in str(error) else ""
            )
            raise ConfigError(
                f"{_FLAG} {self._name} does not take its --lr_scheduler_args: {error}.{hint}"
            ) from error


class _RatesOnly(torch.optim.Optimizer):
    """Groups with a rate each; a step does nothing."""

    def __init__(self, peaks: Sequence[float]) -> None:
        super().__init__([{"params": [nn.Parameter(torch.zeros(1))], "lr": peak} for peak in peaks], {})

    def step(self, closure: None = None) -> None:
        """Do nothing."""


def _rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]
