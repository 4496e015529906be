"""Numbers of a run: the progress line, averages of the loss, and the trackers that record them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from library.core.files import explain
from library.core.log import logger
from library.training.watch.trackers import Tracker

if TYPE_CHECKING:
    import numpy as np

_log = logger("metrics")

_REFRESH = 0.5  # seconds from one progress line to the next: to draw one takes as long as a small update
SMOOTHING = 0.98  # share of the smoothed loss that a step keeps: it averages over about 50 steps


class AverageLoss:
    """Mean loss over the last `window` steps (an epoch), which is what the reference tool calls avr_loss."""

    def __init__(self, window: int) -> None:
        self.losses: deque[float] = deque(maxlen=max(1, window))

    def add(self, loss: float) -> float:
        """Add a step's loss and return the mean; a loss that is not finite does not count."""
        if math.isfinite(loss):
            self.losses.append(loss)
        return sum(self.losses) / len(self.losses) if self.losses else math.nan


class SmoothedLoss:
    """Exponential mean of the loss, without a pull towards zero in the beginning."""

    def __init__(self) -> None:
        self.total = self.weight = 0.0

    def add(self, loss: float) -> float:
        """Add a step's loss and return the mean; a loss that is not finite does not count."""
        if math.isfinite(loss):
            self.total = SMOOTHING * self.total + (1 - SMOOTHING) * loss
            self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)
        return self.total / self.weight if self.weight else math.nan


class Metrics:
    """The run's numbers, step by step. On processes other than the main one nothing is shown or written.

    window: steps of an epoch.
    """

    def __init__(
        self, trackers: list[Tracker], *, total_steps: int, window: int, shown: bool, start: int = 0
    ) -> None:
        """`start`: steps that an earlier part of the run has done."""
        self._trackers = trackers
        self._failing: set[Tracker] = set()
        self._window = window
        self._average = AverageLoss(window)
        self._smoothed = SmoothedLoss()
        self._bar = tqdm(
            total=total_steps,
            initial=start,
            desc="steps",
            smoothing=0.1,
            mininterval=_REFRESH,
            disable=not shown,
            dynamic_ncols=True,
        )

    def export_state(self) -> dict[str, object]:
        """Return what the averages remember, as JSON keeps it exactly."""
        smoothed = self._smoothed
        return {"losses": list(self._average.losses), "smoothed": [smoothed.total, smoothed.weight]}

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Let the averages go on from what `export_state` returned."""
        self._average.losses.extend(state["losses"])
        self._smoothed.total, self._smoothed.weight = state["smoothed"]

    def step(self, step: int, loss: float, others: Mapping[str, float], peak_bytes: int) -> None:
        """Record one optimizer step (counted from 1) and move the progress line."""
        average = self._average.add(loss)
        values = {"loss/current": loss, "loss/average": average, "loss/smoothed": self._smoothed.add(loss)}
        if step % self._window == 0:
            values["loss/epoch_average"] = average
        self.log(step, values | dict(others) | {"memory/peak_gib": peak_bytes / 2**30})
        self._bar.update(1)
        self._bar.set_postfix_str(f"avr_loss={average:.4g}, mem={peak_bytes / 2**30:.2f}GB", refresh=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values that do not belong to the progress line.

        Where they cannot be written, on a full disk for instance, that is told once, and training goes on.
        """
        for tracker in self._trackers:
            try:
                tracker.log(step, values)
                self._failing.discard(tracker)
            except OSError as error:
                if tracker not in self._failing:
                    _log.warning("the numbers of step %d could not be recorded: %s", step, explain(error))
                self._failing.add(tracker)

    def picture(self, step: int, name: str, pixels_HWC: np.ndarray, caption: str) -> None:
        """Show a picture (uint8, RGB) in the trackers that show pictures."""
        for tracker in self._trackers:
            tracker.picture(step, name, pixels_HWC, caption)

    def close(self) -> None:
        """Finish the progress line and the trackers."""
        self._bar.close()
        for tracker in self._trackers:
            tracker.close()
