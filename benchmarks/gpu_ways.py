"""What benchmarks/gpu.py measures: ways to make a training step, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from library.nn.running.runner import MODES

FP32, PLAIN = "none, fp32", "none"
SIDES = (1024, 512, 768)  # of a picture, the most important first
BATCHES = (1, 4)
# How far the loss of a way may be from the plain one's, relative. Without one of these: not at all.
LOSS_MAY_DIFFER = {
    "rounding": 5e-3,  # other kernels round in other places
    "fp8": 5e-2,
    "int8": 5e-2,
    "nf4": 2e-1,
}
BF16_MAY_DIFFER = 1e-2  # the plain loss in bf16 from that in fp32, relative
GRADIENT_MAY_DIFFER = 0.1  # of ways with whole weights: sums in another order, but no wrong backward


@dataclass(frozen=True)
class Way:
    """One way to make a step.

    who: a contestant of step.py. swapped: the share of the blocks. differs: why the loss may be another, a
    key of `LOSS_MAY_DIFFER`. base: the way whose time this one's is compared with. timed: or only compared.
    """

    name: str
    who: str = "ours"
    mode: str = "none"
    kernels: str = "torch"
    attention: str = "auto"
    dtype: torch.dtype = torch.bfloat16
    quant: str | None = None
    quant_matmul: bool = False
    swapped: float = 0.0
    compiled: bool = False
    differs: str | None = None
    base: str = PLAIN
    timed: bool = True

    @property
    def build(self) -> tuple[object, ...]:
        """Ways in which this is the same can share a model."""
        checkpointing = self.who != "ours" and self.mode
        return self.who, checkpointing, self.dtype, self.quant, self.quant_matmul, self.swapped, self.compiled

    @property
    def tolerance(self) -> float:
        """By how much the loss may differ from the plain one's."""
        return 0.0 if self.differs is None else LOSS_MAY_DIFFER[self.differs]


@dataclass(frozen=True)
class Case:
    """A way, for a batch of square pictures of a family's model."""

    family: str
    side: int
    batch: int
    way: Way

    @property
    def place(self) -> tuple[str, int, int]:
        """Where ways are compared with each other."""
        return self.family, self.side, self.batch


EXACT = Way(FP32, dtype=torch.float32, differs="rounding", timed=False)
KEEPING = [Way(mode, mode=mode) for mode in MODES]
TRITON = [
    Way(f"{mode}, triton", mode=mode, kernels="triton", differs="rounding", base=mode)
    for mode in ("none", "selective", "outputs")
]
ATTENTION = [
    Way(f"none, attention {kernel}", attention=kernel, differs="rounding")
    for kernel in ("torch", "cudnn", "varlen", "flash")
]
RIVALS = [
    Way(f"{rival}{end}", who=rival, mode=mode, base=mode)
    for end, mode in (("", "none"), (", checkpointing", "full"))
    for rival in ("diffusers", "reference")
]
SWAP = [
    Way(f"{mode}, {name} of the blocks swapped", mode=mode, swapped=share, base=mode)
    for mode, name, share in (("outputs", "half", 0.5), ("none", "half", 0.5), ("outputs", "all", 1.0))
]
QUANT = [
    Way("full, nf4", mode="full", quant="nf4", differs="nf4", base="full"),
    Way("none, nf4", quant="nf4", differs="nf4"),
    Way("none, int8", quant="int8", differs="int8"),
    Way("none, int8, quant_matmul", quant="int8", quant_matmul=True, differs="int8"),
    Way("none, fp8", quant="fp8", differs="fp8"),
    Way("none, fp8, quant_matmul", quant="fp8", quant_matmul=True, differs="fp8"),
    Way("full, nf4, all swapped", mode="full", quant="nf4", swapped=1.0, differs="nf4", base="full"),
]
COMPILED = [
    Way(f"{mode}, torch_compile", mode=mode, compiled=True, differs="rounding", base=mode)
    for mode in ("none", "full")
]


def plan(families: Sequence[str], sides: Sequence[int], batches: Sequence[int]) -> Iterator[Case]:
    """Yield what is to be measured, the most important first, those that share a model after one another."""
    side, batch = sides[0], batches[0]
    elsewhere = [(s, b) for b in batches for s in sides if (s, b) != (side, batch)]
    for family in families:
        for way in (EXACT, *KEEPING, *TRITON, *ATTENTION, *RIVALS, *SWAP, *QUANT):
            yield Case(family, side, batch, way)
        for s, b in elsewhere:
            ways = KEEPING if b == 1 else [*KEEPING, *ATTENTION, *TRITON]
            yield from (Case(family, s, b, way) for way in ways)
        yield from (Case(family, side, batch, way) for way in COMPILED)
    for family in families:
        yield from (Case(family, s, b, way) for way in RIVALS for s, b in elsewhere)
