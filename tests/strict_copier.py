"""A stand-in for copies on queues of their own, which shows every mistake in their order."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

POISON = 0xFF  # all bits set is NaN in every float type


@dataclass(frozen=True)
class Back:
    """The end of copies from the device: how many have been asked for until then."""

    number: int


class StrictCopier:
    """Copies as late as the marks allow, into rooms that are spoiled as early as they allow.

    Whoever computes with weights before they are there, or after their room was given away, gets NaN. So does
    who reads on the host what comes back from the device before he waited for it himself, and who lets go of
    it before. Masters that are changed while a copy reads them are an error.

    `late`: blocks that were waited for in the very moment in which their copy was asked for.
    `most_alive`: most bytes on the way back, or let go of too late.
    """

    def __init__(self) -> None:
        self.rooms: list[Tensor] = []
        self.asked: list[tuple[list[tuple[Tensor, Tensor]], int]] = []
        self.marks = self.done = self.late = self.most_alive = 0
        self.returning: list[Returning] = []
        self._read: list[list[Tensor]] = []  # what the sources were when their copies were asked for
        self._lock = threading.Lock()

    def room(self, size: int) -> Tensor:
        self.rooms.append(torch.full((size,), POISON, dtype=torch.uint8))
        return self.rooms[-1]

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: int) -> int:
        assert after == self.marks, "a room is taken away from computation that came after this mark"
        pairs = list(pairs)
        for target, _ in pairs:
            target.view(torch.uint8).fill_(POISON)
        self.asked.append((pairs, after))
        self._read.append([source.detach().clone() for _, source in pairs])
        return len(self.asked)

    def copy_back(self, pairs: Iterable[tuple[Tensor, Tensor]], after: int) -> Back:
        assert after == self.marks, "what is computed after this mark may not be there yet"
        with self._lock:
            self._send_back(pairs)
        return Back(len(self.returning))

    def _send_back(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        for target, source in pairs:
            pending = (other.target.data_ptr() for other in self.returning if not other.landed)
            assert target.data_ptr() not in pending, "memory is used again that a copy goes to"
            self.returning.append(Returning(target, source))
        alive = {id(s): s.nbytes for other in self.returning if (s := other.source()) is not None}
        self.most_alive = max(self.most_alive, sum(alive.values()))

    def await_copies(self, copied: int | Back) -> None:
        with self._lock:
            self._await(copied)

    def finish(self, copied: int | Back) -> None:
        with self._lock:
            self._finish(copied)

    def _await(self, copied: int | Back) -> None:
        if isinstance(copied, Back):
            for returning in self.returning[: copied.number]:
                returning.leave()
            return
        self.late += copied > self.done and self.asked[copied - 1][1] == self.marks
        self._arrive(copied)

    def _finish(self, copied: int | Back) -> None:
        if isinstance(copied, Back):
            for returning in self.returning[: copied.number]:
                returning.land()
            return
        self._arrive(copied)

    def _arrive(self, copied: int) -> None:
        for number in range(self.done, copied):
            for (target, source), read in zip(self.asked[number][0], self._read[number], strict=True):
                assert same_bits(source, read), "a master copy was changed while it was being copied"
                target.copy_(source)
            self._read[number].clear()
        self.done = max(self.done, copied)


class Returning:
    """A copy from the device. Its source is known as long as others keep it; afterwards it is overwritten."""

    def __init__(self, target: Tensor, source: Tensor) -> None:
        self.target, self.source = target, weakref.ref(source)
        self.landed = False
        self._value: Tensor | None = None
        target.view(torch.uint8).fill_(POISON)

    def leave(self) -> None:
        """Read the source: the last moment at which that can happen."""
        source = self.source()
        if self._value is None and source is not None:
            self._value = source.detach().clone()

    def land(self) -> None:
        """Be there, for the host."""
        if self.landed:
            return
        self.leave()
        if self._value is not None:
            self.target.copy_(self._value)
        self.landed, self._value = True, None


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.detach().view(-1).view(torch.uint8), other.detach().view(-1).view(torch.uint8))
