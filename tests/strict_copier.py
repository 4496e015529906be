"""A stand-in for copies on a queue of their own, which shows every mistake in their order."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

POISON = 0xFF  # all bits set is NaN in every float type


class StrictCopier:
    """Copies as late as the marks allow, into rooms that are spoiled as early as they allow.

    Whoever computes with weights before they are there, or after their room was given away, gets NaN.
    `late`: blocks that were waited for in the very moment in which their copy was asked for.
    """

    def __init__(self) -> None:
        self.rooms: list[Tensor] = []
        self.asked: list[tuple[list[tuple[Tensor, Tensor]], int]] = []
        self.marks = self.done = self.late = 0

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
        return len(self.asked)

    def await_copies(self, copied: int) -> None:
        self.late += copied > self.done and self.asked[copied - 1][1] == self.marks
        for pairs, _ in self.asked[self.done : copied]:
            for target, source in pairs:
                target.copy_(source)
        self.done = max(self.done, copied)
