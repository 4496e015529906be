"""fp32 weights that are kept as bf16: exactly, with a remainder beside it, or rounded at random.

Notable facts:
- A bf16 number is the upper half of the bits of an fp32 number. So where w is the bf16 number nearest to x,
  their bits differ, as integers, by what 16 bits with a sign can hold:
  bits(x) = (bits(w) << 16) + remainder, with -2**15 <= remainder < 2**15.
- That holds if ties are rounded away from zero. Rounded to even, as torch does it, a bf16 number would stand
  for one fp32 number too many. The integers grow with the size of the number, whatever its sign, so the same
  is true of negative numbers, of denormal ones, and of those that round to infinity.
- NaN stays NaN, of which there are many; all else comes back bit for bit.
- On a CPU the work goes piece by piece, because what torch makes on the way then stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_PIECE = 2**18  # numbers, of a CPU's work
_HALF = 2**15


def joined(weight: Tensor, remainder: Tensor, exact: Tensor | None = None) -> Tensor:
    """Return the fp32 numbers that bf16 `weight` and int16 `remainder` stand for, in `exact` if it is there,
    else in memory of their own.
    """
    if exact is None:
        exact = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for whole, upper, lower in _pieces(exact, weight, remainder):
        whole.copy_(upper)
        whole.view(torch.int32).add_(lower)
    return exact


def split(exact: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Write fp32 numbers as bf16 `weight` and int16 `remainder`, for `joined`; `exact` is used up."""
    for whole, upper, lower in _pieces(exact, weight, remainder):
        bits = whole.view(torch.int32)
        lower.copy_(bits)  # the lower 16 bits
        bits.add_(lower == -_HALF)  # a tie becomes a little more than a tie
        upper.copy_(whole)


def round_randomly(exact: Tensor, weight: Tensor, random: torch.Generator) -> None:
    """Round fp32 numbers up or down to bf16 `weight`; `exact` is used up.

    The nearer of the two is the more likely by as much as it is nearer, so that the mean is right. What
    bf16 can tell stays as it is.
    """
    for whole, rounded in _pieces(exact, weight):
        whole.masked_fill_(whole.isnan(), torch.nan)  # others may have bits that the noise would carry over
        bits = whole.view(torch.int32)
        bits.add_(_sixteen_bits(bits.numel(), random))
        bits.bitwise_and_(-(2**16))
        rounded.copy_(whole)


def _sixteen_bits(count: int, random: torch.Generator) -> Tensor:
    """Return random integers (count,) from 0 to 2**16 - 1, int32."""
    quads = torch.empty(-(-count // 4), dtype=torch.int64, device=random.device)
    quads.random_(-(2**63), None, generator=random)
    return quads.view(torch.int16)[:count].to(torch.int32).bitwise_and_(2**16 - 1)


def _pieces(*tensors: Tensor) -> Iterator[Sequence[Tensor]]:
    """Yield views (n,) of the same parts of tensors of one shape, which together are all of them."""
    flat = [tensor.view(-1) for tensor in tensors]
    size = _PIECE if flat[0].device.type == "cpu" else max(flat[0].numel(), 1)
    return zip(*(tensor.split(size) for tensor in flat), strict=True)
