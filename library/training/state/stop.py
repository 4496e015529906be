"""Being asked to stop: by a signal, by a file, by the clock. Torch-free, so as to be in force from the start.

Before training begins there is nothing to lose, so a signal ends the program on the spot. From then on it is
a wish that the loop grants between two steps, after saving a state. A second signal leaves at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import ParamSpec, TypeVar

from library.core.errors import Stopped

# SIGUSR1 is what batch systems send ahead of their time limit; Windows has neither it nor a real SIGTERM.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")
_SAME_WISH_SECONDS = 2.0  # launchers pass on a signal that the whole process group got: two arrive as one

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class StopSignals:
    """The signals that ask this process to stop."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, leave: Callable[[int], None] = os._exit
    ) -> None:
        self.received: str | None = None
        self.defer = False  # True: remember the signal instead of ending the program
        self._clock, self._leave = clock, leave
        self._first_at = 0.0
        self._ended: Stopped | None = None  # what was raised to end the program

    @contextmanager
    def caught(self) -> Iterator[StopSignals]:
        """Catch the signals until the block ends. Only a main thread can; elsewhere nothing is caught."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [getattr(signal, name) for name in _NAMES if name in dir(signal)]
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield self
        except Exception as error:
            if self._ended is None:
                raise
            raise self._ended from error  # code that a signal fell into may have made another error of it
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            if self._clock() - self._first_at >= _SAME_WISH_SECONDS:
                self._leave(128 + number)  # every file is complete or not there, so nothing needs tidying
            return
        self.received, self._first_at = name, self._clock()
        if not self.defer:
            self._ended = Stopped(f"Stopped by {name} before the first step; the same command starts again.")
            raise self._ended


class StopRequest:
    """Whether the run should stop, and why: a signal, the stop file, or the time limit."""

    def __init__(self, signals: StopSignals, stop_file: Path, max_minutes: float | None) -> None:
        self.stop_file = stop_file
        self._signals = signals
        self._max_minutes = max_minutes
        self._started = time.monotonic()

    def reason(self) -> str | None:
        """Return why the run should stop now, in a few words, or None."""
        if self._signals.received is not None:
            return self._signals.received
        if self.stop_file.exists():
            return f"the file {self.stop_file.name}"
        if self._max_minutes is not None and time.monotonic() - self._started >= self._max_minutes * 60:
            return f"--max_train_minutes {self._max_minutes:g}"
        return None

    def check(self) -> None:
        """Raise Stopped, with the reason, if the run should stop now."""
        reason = self.reason()
        if reason is not None:
            raise Stopped(reason)

    def interruptible(self, call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """Return `call`, which now raises Stopped when the run should stop: for what can be done again."""

        def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            self.check()
            return call(*args, **kwargs)

        return checked
