"""What the benchmarks of a training step share: what is measured, who takes part, and by which clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

RANK = 16


class Contestant(Protocol):
    """An implementation with its trainable weights."""

    trained: list[torch.nn.Parameter]

    def loss(self, work: Any) -> Tensor:
        """Forward, for a batch of the family's own kind."""


class Size(Protocol):
    """A model of a family, and what it is given."""

    @property
    def params(self) -> Any:
        """The sizes of the network."""


@dataclass(frozen=True)
class Family:
    """The models of one family. Contestants make an implementation; the first is ours, the others rivals.

    work: draws a batch. useful_flops: operations of the products that a step cannot do without. tokens: how
    many a batch has.
    """

    name: str
    sizes: Mapping[str, Size]
    contestants: Mapping[str, Callable[[Settings], Contestant]]
    work: Callable[[Settings], Any]
    useful_flops: Callable[[Settings], float]
    tokens: Callable[[Settings], int]


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    family: Family
    size: str
    dtype: torch.dtype
    batch: int
    device: torch.device
    checkpointing: bool

    def __str__(self) -> str:
        more = ", checkpointing" if self.checkpointing else ""
        name = "" if self.family.name == "lumina" else f"{self.family.name} "
        return f"{name}{self.size}, {self.dtype}, batch {self.batch}, {self.device.type}{more}"

    @property
    def params(self) -> Any:
        """Of the model."""
        return self.family.sizes[self.size].params


class Clock:
    """Seconds that a function takes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind = "device" if device.type == "cuda" else "CPU" if torch.get_num_threads() == 1 else "wall"

    def __call__(self, function: Callable[[], object]) -> float:
        if self.kind == "device":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000
        read = time.process_time if self.kind == "CPU" else time.perf_counter
        begin = read()
        function()
        return read() - begin


def make_step(contestant: Contestant, work: object) -> Callable[[], None]:
    """Return one optimizer step as a function."""
    optimizer = torch.optim.AdamW(contestant.trained, lr=1e-4)

    def step() -> None:
        contestant.loss(work).backward()
        torch.nn.utils.clip_grad_norm_(contestant.trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def disturb(trained: list[torch.nn.Parameter]) -> None:
    """Move LoRA away from its start, where half of it is zero."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in trained:
            weight.add_(0.01 * torch.randn(weight.shape, generator=draw).to(weight.device))
