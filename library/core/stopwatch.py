"""Where the time of a job with several stages goes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class Stopwatch:
    """Adds up the seconds of named stages. Stages may run in several threads, and at the same time."""

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()
        self._lock = Lock()

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Count the time until the block ends for a stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[stage] += time.perf_counter() - begin

    def seconds(self, stage: str) -> float:
        """Return what a stage took so far; 0 for one that never ran."""
        return self._seconds[stage]
