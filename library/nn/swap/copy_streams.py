"""Copies to a device and back beside its computation, and how these wait for each other.

A `Copier` has a queue of its own for copies of each direction. `mark` is a point in the computation, behind
everything that was queued until now; copies begin after such a point. The computation waits for copies
(`await_copies`); the program does so only where it touches the computer's memory itself (`finish`).
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
    """Copies that run beside the computation, those of one direction one after another."""

    def room(self, size: int) -> Tensor:
        """Return `size` bytes of the device to copy to."""

    def mark(self) -> Mark:
        """Return the point that the computation has been queued to."""

    def copy(self, pairs: Pairs, after: Mark) -> Copied:
        """Queue copies to the device that begin when the computation is at `after`.

        The sources do not change until the program has called `finish`.
        """

    def copy_back(self, pairs: Pairs, after: Mark) -> Copied:
        """Queue copies from the device that begin when the computation is at `after`.

        Whoever asks keeps the sources until the end of these copies, or of later ones, was awaited: their
        memory is used again then. The targets are read and changed after `finish` only.
        """

    def await_copies(self, copied: Copied) -> None:
        """Let computation that is queued from now on wait for these copies."""

    def finish(self, copied: Copied) -> None:
        """Let the program wait for these copies, and so for those of their direction before them."""


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

    def copy_back(self, pairs: Pairs, after: None) -> None:
        """Copy now."""
        self.copy(pairs, after)

    def await_copies(self, copied: None) -> None:
        """They are done."""

    def finish(self, copied: None) -> None:
        """They are done."""


class CudaCopier:
    """Copies on CUDA streams of their own, one for each direction.

    A copy from or to page-locked memory is queued in no time. Any other keeps the thread that asks for it
    until it is done, so a thread beside the program asks; the program waits for it where it needs the copy.
    """

    def __init__(self, device: torch.device, *, page_locked: bool) -> None:
        """`page_locked`: all memory of the computer that is copied from or to is page-locked."""
        self._device = device
        self._stream, self._stream_back = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._thread = None if page_locked else _thread("copies", self._stream.device)
        self._thread_back = None if page_locked else _thread("copies-back", self._stream.device)

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
        return _by(self._thread, self._stream, pairs, after)

    def copy_back(self, pairs: Pairs, after: torch.cuda.Event) -> Future[torch.cuda.Event]:
        """Queue copies behind `after`; the event is there as soon as they are queued."""
        return _by(self._thread_back, self._stream_back, pairs, after)

    def await_copies(self, copied: Future[torch.cuda.Event]) -> None:
        """Let what this thread queues from now on wait for the copies."""
        torch.cuda.current_stream(self._device).wait_event(copied.result())

    def finish(self, copied: Future[torch.cuda.Event]) -> None:
        """Wait for the copies."""
        copied.result().synchronize()


def _thread(name: str, device: torch.device) -> ThreadPoolExecutor:
    """Return a thread of a device. Left on the first GPU, where each begins, it would take memory there."""
    return ThreadPoolExecutor(
        1, thread_name_prefix=name, initializer=torch.cuda.set_device, initargs=(device,)
    )


def _by(
    thread: ThreadPoolExecutor | None, stream: torch.cuda.Stream, pairs: Pairs, after: torch.cuda.Event
) -> Future[torch.cuda.Event]:
    """Let a thread queue copies, or queue them now."""
    if thread is not None:
        return thread.submit(_queue, stream, pairs, after)
    done: Future[torch.cuda.Event] = Future()
    done.set_result(_queue(stream, pairs, after))
    return done


def _queue(stream: torch.cuda.Stream, pairs: Pairs, after: torch.cuda.Event) -> torch.cuda.Event:
    stream.wait_event(after)
    with torch.cuda.stream(stream):
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
    return stream.record_event()


def copier_for(device: torch.device, *, page_locked: bool) -> PlainCopier | CudaCopier:
    """Return the copier of a device; `page_locked`: all memory that is copied from or to is page-locked."""
    return CudaCopier(device, page_locked=page_locked) if device.type == "cuda" else PlainCopier(device)
