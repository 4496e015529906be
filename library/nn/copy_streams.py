"""Copies to a device beside its computation, and how the two wait for each other.

A `Copier` has a queue of its own for copies. `mark` is a point in the computation, behind everything that was
queued until now; copies begin after such a point, and the computation waits for copies, not the program.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Pairs = Iterable[tuple[Tensor, Tensor]]  # target and source of each copy
Mark = TypeVar("Mark")  # a point in the computation
Copied = TypeVar("Copied")  # the end of some copies


class Copier(Protocol[Mark, Copied]):
    """Copies that run beside the computation, one after another."""

    def room(self, size: int) -> Tensor:
        """Return `size` bytes of the device to copy to."""

    def mark(self) -> Mark:
        """Return the point that the computation has been queued to."""

    def copy(self, pairs: Pairs, after: Mark) -> Copied:
        """Queue copies that begin when the computation is at `after`. The sources do not change."""

    def await_copies(self, copied: Copied) -> None:
        """Let computation that is queued from now on wait for these copies."""


class PlainCopier:
    """Copies among the computation: for the CPU, and for devices with a single queue."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def room(self, size: int) -> Tensor:
        """Return memory of the device."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def mark(self) -> None:
        """Everything happens in the order in which it is asked for."""

    def copy(self, pairs: Pairs, after: None) -> None:
        """Copy now."""
        for target, source in pairs:
            target.copy_(source)

    def await_copies(self, copied: None) -> None:
        """They are done."""


class CudaCopier:
    """Copies on a CUDA stream of their own.

    A copy from page-locked memory is queued in no time. Any other keeps the thread that asks for it until it
    is done, so a thread beside the program asks; the program waits for it where it needs the copy.
    """

    def __init__(self, device: torch.device, *, page_locked: bool) -> None:
        """`page_locked`: all sources are in page-locked memory."""
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._thread = None if page_locked else ThreadPoolExecutor(1, thread_name_prefix="copies")

    def room(self, size: int) -> Tensor:
        """Return memory of the device that the stream of copies may use."""
        room = torch.empty(size, dtype=torch.uint8, device=self._device)
        room.record_stream(self._stream)  # once freed, it is used again only when the last copy is done
        return room

    def mark(self) -> torch.cuda.Event:
        """Return an event behind all that is queued."""
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, pairs: Pairs, after: torch.cuda.Event) -> Future[torch.cuda.Event]:
        """Queue copies behind `after`; the event is there as soon as they are queued."""
        if self._thread is not None:
            return self._thread.submit(self._copy, pairs, after)
        done: Future[torch.cuda.Event] = Future()
        done.set_result(self._copy(pairs, after))
        return done

    def await_copies(self, copied: Future[torch.cuda.Event]) -> None:
        """Let what this thread queues from now on wait for the copies."""
        torch.cuda.current_stream(self._device).wait_event(copied.result())

    def _copy(self, pairs: Pairs, after: torch.cuda.Event) -> torch.cuda.Event:
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return self._stream.record_event()


def copier_for(device: torch.device, *, page_locked: bool) -> PlainCopier | CudaCopier:
    """Return the copier of a device; `page_locked`: all sources are in page-locked memory."""
    return CudaCopier(device, page_locked=page_locked) if device.type == "cuda" else PlainCopier(device)
