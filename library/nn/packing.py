"""Where the samples of a packed batch lie: the tokens of all samples are one sequence, end to end.

Shape legend: T tokens, B samples, D features, P pairs of features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


@dataclass(frozen=True)
class Packing:
    """Where the samples of a packed batch lie.

    lengths: tokens of each sample. ends: (B + 1,) int32 on the device, 0 and each sample's end.

    Compiled code reads `ends` only: every number in `lengths` would be a reason to compile it again.
    """

    lengths: tuple[int, ...]
    ends: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        """Describe a batch; on CUDA the ends are copied without waiting for the device."""
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        ends = ends.pin_memory() if device.type == "cuda" else ends
        return cls(tuple(lengths), ends.to(device, non_blocking=True))


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a packed sequence belong: to which sample, and at which position in it."""

    packing: Packing
    rope_TP2: Tensor

    def split(self, x_TD: Tensor) -> Sequence[Tensor]:
        """Return each sample's tokens."""
        return x_TD.split(list(self.packing.lengths))

    @classmethod
    def of(cls, lengths: Sequence[int], ropes: Sequence[Tensor], device: torch.device) -> Layout:
        """Join samples, each with its own table. The joint one is no view: where that begins would be a
        reason to compile again."""
        return cls(Packing.of(lengths, device), torch.cat(ropes))


def spread(rows_BD: Tensor, packing: Packing, tokens: int) -> Tensor:
    """Return each sample's row once for each of its `tokens`, (T, D), whatever the number of samples."""
    index_T = torch.arange(tokens, dtype=torch.int32, device=rows_BD.device)
    return _Spread.apply(rows_BD, torch.bucketize(index_T, packing.ends[1:], right=True))


def by_sample(
    lengths: tuple[int, ...], rows: Sequence[Tensor], packed: Sequence[Tensor]
) -> list[list[Tensor]]:
    """Return what is to be computed at once: rows that broadcast, then the tokens that they are for.

    That is all tokens, if there is one row for all or if samples are equally long (B, L, D), and else each
    sample for itself. Tokens are views.

    Args:
        rows: (B, D) each, or (1, D). packed: (T, D) each.
    """
    samples = len(rows[0])
    if samples == 1:
        return [[*rows, *packed]]
    if len(set(lengths)) == 1:
        together = [tokens_TD.unflatten(0, (samples, lengths[0])) for tokens_TD in packed]
        return [[*(rows_BD.unsqueeze(1) for rows_BD in rows), *together]]
    return [
        list(each) for each in zip(*rows, *(tokens_TD.split(lengths) for tokens_TD in packed), strict=True)
    ]


class _Spread(torch.autograd.Function):
    """rows[sample]. Backward is a product, because adding up by index is not deterministic on a GPU."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows_BD: Tensor, sample_T: Tensor) -> Tensor:
        ctx.save_for_backward(sample_T)
        ctx.samples = len(rows_BD)
        return rows_BD[sample_T]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_TD: Tensor) -> tuple[Tensor, None]:
        (sample_T,) = ctx.saved_tensors
        samples_B1 = torch.arange(ctx.samples, device=sample_T.device).unsqueeze(1)
        return (samples_B1 == sample_T).to(grad_TD.dtype) @ grad_TD, None
