"""What is kept of a model and of what is trained, on the device and where swapped blocks wait.

What a step makes and drops, and when, is found out by `simulate`. How much of it is on the device beside all
this is told here, where it is known what becomes of gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from library.nn.swap.block_swap import spread
from library.nn.swap.gradient_return import UNDER_WAY
from library.nn.swap.swapped_weights import Layout, owned_by
from library.options.swap import SwapOptions
from library.training.look.meter import Meter, Speeds
from library.training.look.simulate import GradientRules, Step, trained_weights, weight_bytes
from library.training.optim.optimizer import set_learning_rates
from library.training.trainee.kind import Trainee

Parts = dict[str, int]  # bytes of what is in memory at the same time

ACTIVATIONS = "activations of the largest batch"
_GRADIENTS = "gradients"

_SAMPLE = 512  # rows and columns of the matrix that tells what an optimizer takes; constants hardly count


@dataclass(frozen=True)
class BlockWeights:
    """The weights of each block of a model, as long as nothing is put on it: those that can be swapped."""

    tensors: tuple[tuple[Tensor, ...], ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, blocks: Iterable[nn.Module]) -> BlockWeights:
        """Look at the blocks of a model, whose weights are still frozen."""
        tensors = [tuple(getattr(*place) for place in owned_by(block)) for block in blocks]
        return cls(tuple(tensors), tuple(Layout(each).size for each in tensors))

    def waiting(self, swap: SwapOptions) -> int:
        """Return the bytes of weights that wait in the computer's memory."""
        return sum(self.sizes[number] for number in self._swapped(swap))

    def ring(self, swap: SwapOptions) -> int:
        """Return the bytes of the rooms on the device."""
        sizes = [self.sizes[number] for number in self._swapped(swap)]
        return min(swap.block_swap_ring_size, len(sizes)) * max(sizes, default=0)

    def swapped(self, swap: SwapOptions) -> set[Tensor]:
        """Return the weights that wait in the computer's memory."""
        return {tensor for number in self._swapped(swap) for tensor in self.tensors[number]}

    def _swapped(self, swap: SwapOptions) -> list[int]:
        swap.check(len(self.sizes))
        return spread(len(self.sizes), swap.count)


class Sample(nn.Module):
    """A few small weights to train, in place of a network or a model."""

    enabled = True
    multiplier = 1.0

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        shape = (_SAMPLE, _SAMPLE)
        weights = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(count)]
        self.weights = nn.ParameterList(weights)

    def parameter_groups(self, lr: float) -> list[dict[str, object]]:
        """Return the one optimizer group."""
        return [{"params": list(self.weights), "lr": lr, "name": "sample"}]

    def parameter_count(self) -> int:
        """Return how many numbers are trained."""
        return len(self.weights) * _SAMPLE**2


@dataclass(frozen=True)
class Upkeep:
    """What a trained weight takes beside itself and its gradient, in bytes for each of its numbers.

    rest: kept of the fp32 weight beside a bf16 one. state: remembered by the optimizer. room: comes and goes
    while it is stepped. moved: read and written then. together: all weights are stepped at once.
    """

    rest: float
    state: float
    room: float
    moved: float
    together: bool

    @classmethod
    def of(
        cls, make: Callable[[Sample], torch.optim.Optimizer], dtype: torch.dtype, device: torch.device
    ) -> Upkeep:
        """Find it out by letting the optimizer make steps, with one weight and with two."""
        one, two = (_stepped(make, Sample(count, dtype, device)) for count in (1, 2))
        rest, state, room, moved = (size / _SAMPLE**2 for size in one)
        return cls(rest, state, room, moved, together=two[2] > 1.5 * one[2])


def _stepped(
    make: Callable[[Sample], torch.optim.Optimizer], sample: Sample
) -> tuple[float, float, float, float]:
    """Return the bytes of an `Upkeep`, in all."""
    weights = list(sample.weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    bytes_only = Speeds(products=float("inf"), memory=1, link=1, launch=0)
    with Meter({weights[0].device.type}, bytes_only) as meter:
        meter.ignore([*weights, *(weight.grad for weight in weights)])
        optimizer = make(sample)
        rest = meter.live
        for number in range(2):  # what is remembered is made in the first step
            meter.take_peak()
            before, start = meter.live, meter.seconds
            set_learning_rates(optimizer, lambda step, peaks: peaks, number)
            optimizer.step()
    return rest, before - rest, meter.peak - before, meter.seconds - start


class Holdings:
    """What lies where, of a model and of what is trained."""

    def __init__(
        self,
        model: nn.Module,
        trainee: Trainee,
        blocks: BlockWeights,
        upkeep: Callable[[torch.dtype], Upkeep],
        *,
        in_backward: bool,
        several: bool,
        under_way: int = UNDER_WAY,
    ) -> None:
        """`upkeep` of weights of a dtype. `in_backward`: each is stepped as soon as its gradient is there;
        `under_way`: so many gradients of swapped weights are then in the computer's memory. `several`:
        gradients of a few batches are added up.
        """
        self.blocks = blocks
        self._trained = trained_weights(trainee)
        self._upkeep = cache(upkeep)
        self._in_backward, self._several, self._under_way = in_backward, several, under_way
        self._model = weight_bytes(model)
        self._beside = weight_bytes(model, trainee) - self._model  # a whole model is not beside itself

    def in_steps(self, step: Step, swap: SwapOptions) -> Parts:
        """Return what steps take of the device at most: what is there at the end, and what comes and goes."""
        rules = self._rules(swap)
        passing = step.peak_with(rules) - step.staying_with(rules)
        here, _ = self._places(swap)
        updating = 0 if self._in_backward else self._room(here)  # what it takes in backward, the rules know
        return self._at_end(swap) | {ACTIVATIONS: max(passing, updating)}

    def between_steps(self, swap: SwapOptions) -> Parts:
        """Return what is on the device all the time."""
        return {name: size for name, size in self._at_end(swap).items() if name != _GRADIENTS}

    def in_computer(self, swap: SwapOptions) -> Parts:
        """Return what is in the computer's memory because blocks are swapped, at most."""
        _, there = self._places(swap)
        parts = {"weights of swapped blocks": self.blocks.waiting(swap), **self._kept(there)}
        at_once = 2 if self._several else self._under_way if self._in_backward else 0
        arriving = at_once * max((p.nbytes for p in there), default=0)
        return _filled(
            parts | {"gradients on their way, work of the optimizer": arriving + self._room(there)}
        )

    def numbers(self, swap: SwapOptions) -> tuple[int, int]:
        """Return how many numbers are trained on the device, and how many in the computer's memory."""
        here, there = self._places(swap)
        return sum(weight.numel() for weight in here), sum(weight.numel() for weight in there)

    def trained_bytes(self, swap: SwapOptions) -> int:
        """Return what the trained weights on the device take."""
        return sum(weight.nbytes for weight in self._places(swap)[0])

    def update_seconds(self, swap: SwapOptions, speeds: Speeds) -> float:
        """Return how long stepping all weights takes, each where it lies."""
        here, there = (
            sum(weight.numel() * self._upkeep(weight.dtype).moved for weight in weights)
            for weights in self._places(swap)
        )
        return here / speeds.memory + there / speeds.host

    def _at_end(self, swap: SwapOptions) -> Parts:
        """Return what is on the device at the end of a step."""
        here, _ = self._places(swap)
        weights = self._model - self.blocks.waiting(swap) + self.blocks.ring(swap)
        return _filled({"transformer": weights, "network": self._beside, **self._kept(here)})

    def _rules(self, swap: SwapOptions) -> GradientRules:
        """Return what becomes of gradients."""
        swapped = self.blocks.swapped(swap)
        places = enumerate(self._trained)
        leaving = {number for number, weight in places if weight in swapped}
        here = {n: self._room([weight]) for n, weight in enumerate(self._trained) if n not in leaving}
        if self._in_backward:
            return GradientRules(leaving, queue=0, used=here)
        largest = max((sum(t.nbytes for t in block) for block in self.blocks.tensors), default=0)
        return GradientRules(leaving, queue=largest, there=self._several)

    def _places(self, swap: SwapOptions) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the trained weights on the device, and those in the computer's memory."""
        swapped = self.blocks.swapped(swap)
        here = [weight for weight in self._trained if weight not in swapped]
        return here, [weight for weight in self._trained if weight in swapped]

    def _kept(self, weights: Sequence[nn.Parameter]) -> Parts:
        """Return what is kept beside these weights."""
        upkeeps = [(weight.numel(), self._upkeep(weight.dtype)) for weight in weights]
        return {
            "what is kept of fp32 weights": round(sum(count * upkeep.rest for count, upkeep in upkeeps)),
            _GRADIENTS: 0 if self._in_backward else sum(weight.nbytes for weight in weights),
            "optimizer": round(sum(count * upkeep.state for count, upkeep in upkeeps)),
        }

    def _room(self, weights: Sequence[nn.Parameter]) -> int:
        """Return what comes and goes while these are stepped."""
        rooms = [(weight.numel() * self._upkeep(weight.dtype).room, weight) for weight in weights]
        at_once = [room for room, weight in rooms if self._upkeep(weight.dtype).together]
        return round(max(sum(at_once), max((room for room, _ in rooms), default=0)))


def _filled(parts: Parts) -> Parts:
    """Return the parts that take anything."""
    return {name: size for name, size in parts.items() if size}
