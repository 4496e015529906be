"""Numbers of a run: the progress line, a metrics file that is always written, and TensorBoard when asked
for."""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import Protocol, TextIO

from tqdm import tqdm

from library.options.saving import LoggingOptions


class Tracker(Protocol):
    """A place that numbers go to."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record `values` at `step`."""

    def close(self) -> None:
        """Finish writing."""


class JsonLines:
    """One JSON object a line, appended; `session` tells runs that share a file apart."""

    def __init__(self, path: Path, session: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = open(path, "a", encoding="utf-8", buffering=1)
        self._session = session

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line."""
        self._file.write(json.dumps({"session": self._session, "step": step} | values) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """TensorBoard scalars under `<logging_dir>/<log_prefix><time stamp>/<log_tracker_name>`."""

    def __init__(self, options: LoggingOptions) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second of import that most runs need not pay

        assert options.logging_dir is not None
        stamp = options.log_prefix + time.strftime("%Y%m%d%H%M%S")
        self._writer = SummaryWriter(str(options.logging_dir / stamp / options.log_tracker_name))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add each value as a scalar."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class AverageLoss:
    """Mean loss over the last `window` steps (an epoch), which is what the reference tool calls avr_loss."""

    def __init__(self, window: int) -> None:
        self._losses: deque[float] = deque(maxlen=max(1, window))

    def add(self, loss: float) -> float:
        """Add a step's loss and return the mean."""
        self._losses.append(loss)
        return sum(self._losses) / len(self._losses)


class Metrics:
    """The run's numbers, step by step. On processes other than the main one nothing is shown or written."""

    def __init__(self, trackers: list[Tracker], *, total_steps: int, window: int, shown: bool) -> None:
        self._trackers = trackers
        self._average = AverageLoss(window)
        self._bar = tqdm(
            total=total_steps, desc="steps", smoothing=0.1, disable=not shown, dynamic_ncols=True
        )

    def step(self, step: int, loss: float, others: dict[str, float], peak_bytes: int) -> None:
        """Record one optimizer step (counted from 1) and move the progress line."""
        average = self._average.add(loss)
        self.log(step, {"loss/current": loss, "loss/average": average} | others)
        self._bar.update(1)
        self._bar.set_postfix_str(f"avr_loss={average:.4g}, mem={peak_bytes / 2**30:.2f}GB", refresh=False)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values that do not belong to the progress line."""
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        """Finish the progress line and the trackers."""
        self._bar.close()
        for tracker in self._trackers:
            tracker.close()


def make_trackers(
    options: LoggingOptions, metrics_file: Path, session: str, *, is_main: bool
) -> list[Tracker]:
    """Return the trackers that the options ask for; none on other processes."""
    if not is_main:
        return []
    trackers: list[Tracker] = [JsonLines(metrics_file, session)]
    if options.logging_dir is not None:
        trackers.append(TensorBoard(options))
    return trackers
