"""Work done ahead of time by threads, in order and within bounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def map_ahead(work: Callable[[In], Out], items: Iterable[In], *, threads: int, ahead: int) -> Iterator[Out]:
    """Yield work(item) for each item in order, like `map`, computed up to `ahead` items early by threads.

    The result does not depend on the number of threads; 0 computes each item when it is asked for. An
    exception of `work` is raised where its result would have come. Closing the iterator drops what is still
    waiting.
    """
    if threads == 0:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    waiting: deque[Future[Out]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Behind:
    """Calls made by one thread in order, while the caller goes on; at most `limit` wait at a time.

    An exception of a call is raised by a later `submit`, or when the `with` block ends.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self._waiting and kind is None:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=kind is not None)

    def submit(self, call: Callable[[], None]) -> None:
        """Queue a call; waits for the oldest one when too many are queued."""
        self._waiting.append(self._pool.submit(call))
        if len(self._waiting) > self._limit:
            self._waiting.popleft().result()
