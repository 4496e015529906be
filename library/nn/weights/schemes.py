"""Ways to store a weight in 8 or 4 bits.

| scheme | codes | scale | bits a weight |
| --- | --- | --- | --- |
| fp8 | float8_e4m3fn | fp32, one an output row | 8 |
| int8 | integers -127..127 | fp32, one an output row | 8 |
| int4 | integers 0..15, two a byte | bf16 step and minimum, one a group of inputs | 4.5 at groups of 64 |
| nf4 | numbers of a table, two a byte | bf16, one a group of inputs | 4.25 at groups of 64 |

The table of nf4 has the quantiles of a normal distribution: QLoRA, https://arxiv.org/abs/2305.14314, appendix
E. Scales are rounded before codes are chosen, so rounding them costs nothing twice.

Shape legend: I in features, O out features, G groups of an output row, S weights of a group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from library.core.device import sent
from library.options.quant import GROUP

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
TINY = 1e-12  # in place of the scale of a row or group of zeros

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_CODES = tuple(map(float, range(16)))


class Scheme(Protocol):
    """One way to store a weight, without state of its own. `options.quant.STORED` names its tensors.

    codes_each: how many codes lie in a number of the first one.
    """

    codes_each: int

    def pack(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors that stand for a weight. The first holds the codes."""

    def unpack(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the weight (O, I) that the tensors stand for."""


class _ByRow:
    """Codes (O, I) of 8 bits and one fp32 scale for each row (O, 1)."""

    codes_each = 1

    def unpack(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """See `Scheme`."""
        codes_OI, scale_O1 = stored
        return codes_OI.to(dtype).mul_(scale_O1.to(dtype))


class Fp8(_ByRow):
    """Floating point with 4 bits of exponent and 3 of mantissa, scaled so that a row's largest is 448."""

    def pack(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        """See `Scheme`."""
        scale_O1 = _largest_of_rows(weight_OI) / _FP8_MAX
        return (weight_OI.float() / scale_O1).to(torch.float8_e4m3fn), scale_O1

    def unpack(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """See `Scheme`. Processors have no instruction for these numbers, and look them up faster."""
        codes_OI, scale_O1 = stored
        if codes_OI.device.type != "cpu" or codes_OI.shape[1] % 2:
            return super().unpack(stored, dtype)
        numbers_OI = _looked_up(_fp8_pairs(dtype), codes_OI.view(torch.uint16), dtype).view_as(codes_OI)
        return numbers_OI.mul_(scale_O1.to(dtype))


class Int8(_ByRow):
    """Integers, scaled so that a row's largest is 127."""

    def pack(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        """See `Scheme`."""
        scale_O1 = _largest_of_rows(weight_OI) / 127
        return (weight_OI.float() / scale_O1).round_().to(torch.int8), scale_O1


class Int4:
    """16 equal steps from the smallest to the largest weight of a group."""

    codes_each = 2

    def pack(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        """Codes (O, I / 2), steps (O, G, 1) and minima (O, G, 1)."""
        groups_OGS = _grouped(weight_OI)
        low_OG1 = groups_OGS.amin(2, keepdim=True).to(torch.bfloat16)
        span_OG1 = groups_OGS.amax(2, keepdim=True) - low_OG1.float()
        step_OG1 = (span_OG1.clamp_min(TINY) / 15).to(torch.bfloat16)
        codes_OGS = ((groups_OGS - low_OG1.float()) / step_OG1.float()).round_().clamp_(0, 15)
        return _two_a_byte(codes_OGS.flatten(1).to(torch.uint8)), step_OG1, low_OG1

    def unpack(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """See `Scheme`."""
        packed, step_OG1, low_OG1 = stored
        codes_OGS = _looked_up(_pairs_for(packed, _CODES, dtype), packed, dtype)
        codes_OGS = codes_OGS.view(*step_OG1.shape[:2], -1)
        return torch.addcmul(low_OG1.to(dtype), codes_OGS, step_OG1.to(dtype)).flatten(1)


class Nf4:
    """The nearest of 16 numbers that are as dense as a normal distribution, times the group's largest."""

    codes_each = 2

    def pack(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        """Codes (O, I / 2) and scales (O, G, 1)."""
        groups_OGS = _grouped(weight_OI)
        scale_OG1 = groups_OGS.abs().amax(2, keepdim=True).clamp_min(TINY).to(torch.bfloat16)
        table = torch.tensor(_NF4, device=weight_OI.device)
        middles = (table[1:] + table[:-1]) / 2
        codes_OGS = torch.bucketize(groups_OGS / scale_OG1.float(), middles)
        return _two_a_byte(codes_OGS.flatten(1).to(torch.uint8)), scale_OG1

    def unpack(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """See `Scheme`."""
        packed, scale_OG1 = stored
        numbers_OGS = _looked_up(_pairs_for(packed, _NF4, dtype), packed, dtype)
        return numbers_OGS.view(*scale_OG1.shape[:2], -1).mul_(scale_OG1.to(dtype)).flatten(1)


SCHEMES: dict[str, Scheme] = {"fp8": Fp8(), "int8": Int8(), "int4": Int4(), "nf4": Nf4()}


def _largest_of_rows(weight_OI: Tensor) -> Tensor:
    """Return the largest absolute value of each row (O, 1), in fp32 and never 0."""
    return weight_OI.float().abs().amax(1, keepdim=True).clamp_min(TINY)


def _grouped(weight_OI: Tensor) -> Tensor:
    """(O, I) -> fp32 (O, G, S)."""
    return weight_OI.float().unflatten(1, (-1, math.gcd(weight_OI.shape[1], GROUP)))


def _two_a_byte(codes: Tensor) -> Tensor:
    """Put neighbours of the last dimension, numbers 0..15, into one byte, the first into its lower half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


# ---- two numbers looked up at once, as one of twice the width ----

_WIDE = {2: torch.int32, 4: torch.int64}  # by bytes of a number, what two of them are seen as


def _looked_up(pairs: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers that a table has for words, two for each, one after another; a fresh tensor."""
    return pairs.index_select(0, words.flatten().int()).view(dtype)


def _pairs_for(packed: Tensor, numbers: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Return what each byte of two codes stands for, on the device of `packed`."""
    if packed.device.type == "meta":  # which may be of a mode that soon ends
        return _pairs_of_byte(numbers, dtype).to(packed.device)
    return _pairs_on(packed.device, numbers, dtype)


@functools.cache  # copied once, and not for each product
def _pairs_on(device: torch.device, numbers: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    return sent(_pairs_of_byte(numbers, dtype), device)


def _pairs_of_byte(numbers: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    pairs = [(numbers[byte & 15], numbers[byte >> 4]) for byte in range(2**8)]
    return torch.tensor(pairs, dtype=dtype).view(_WIDE[dtype.itemsize]).flatten()


@functools.cache
def _fp8_pairs(dtype: torch.dtype) -> Tensor:
    """Return what 16 bits stand for that are two numbers in fp8, (65536,), on the CPU."""
    words = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    return words.view(torch.float8_e4m3fn).to(dtype).view(_WIDE[dtype.itemsize])
