"""Frozen weights in 8 or 4 bits, and a linear layer that multiplies with them.

A weight is kept as codes and scales; for a product it is restored to the dtype of the activations, used, and
dropped, forward as backward. So the stored form is all that a quantised model occupies, and nothing but the
stored form is kept for backward. Codes of 8 bits can be multiplied as they are, see `library.nn.eight_bit`.

| scheme | codes | scale | bits a weight |
| --- | --- | --- | --- |
| fp8 | float8_e4m3fn | fp32, one an output row | 8 |
| int8 | integers -127..127 | fp32, one an output row | 8 |
| int4 | integers 0..15, two a byte | bf16 step and minimum, one a group of inputs | 4.5 at groups of 64 |
| nf4 | numbers of a table, two a byte | bf16, one a group of inputs | 4.25 at groups of 64 |

The table of nf4 has the quantiles of a normal distribution: QLoRA, https://arxiv.org/abs/2305.14314, appendix
E. Scales are rounded before codes are chosen, so rounding them costs nothing twice.

Shape legend: N rows, I in features, O out features, G groups of an output row, S weights of a group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from library.core.device import sent
from library.nn import eight_bit
from library.nn.products import Linear, cast, layer_dtype
from library.options.quant import GROUP, STORED, check_width

_IN_8_BITS = " in 8 bits"  # ends the name of a scheme whose codes are multiplied as they are
_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
_TINY = 1e-12  # in place of the scale of a row or group of zeros

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_CODES = tuple(map(float, range(16)))


class Scheme(Protocol):
    """One way to store a weight, without state of its own. `options.quant.STORED` names its tensors."""

    def pack(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors that stand for a weight. The first holds the codes."""

    def unpack(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the weight (O, I) that the tensors stand for."""


class _ByRow:
    """Codes (O, I) of 8 bits and one fp32 scale for each row (O, 1)."""

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
        if codes_OI.device.type != "cpu" or codes_OI.shape[1] % 2 or torch.compiler.is_compiling():
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

    def pack(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        """Codes (O, I / 2), steps (O, G, 1) and minima (O, G, 1)."""
        groups_OGS = _grouped(weight_OI)
        low_OG1 = groups_OGS.amin(2, keepdim=True).to(torch.bfloat16)
        span_OG1 = groups_OGS.amax(2, keepdim=True) - low_OG1.float()
        step_OG1 = (span_OG1.clamp_min(_TINY) / 15).to(torch.bfloat16)
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

    def pack(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        """Codes (O, I / 2) and scales (O, G, 1)."""
        groups_OGS = _grouped(weight_OI)
        scale_OG1 = groups_OGS.abs().amax(2, keepdim=True).clamp_min(_TINY).to(torch.bfloat16)
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


def restore(way: str | None, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the weight that tensors stand for: themselves, without a scheme."""
    if way is None:
        return cast(stored[0], dtype)
    return SCHEMES[way.removesuffix(_IN_8_BITS)].unpack(stored, dtype)


def product(
    x_NI: Tensor, way: str | None, stored: Sequence[Tensor], bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the output of a linear layer, (N, O) in `dtype`: x times the transposed weight, and the bias."""
    if _in_8_bits(way, x_NI, stored):
        y_NO = eight_bit.multiply(x_NI, *stored)
        return cast(y_NO if bias_O is None else y_NO.add_(bias_O), dtype)
    bias_O = None if bias_O is None else cast(bias_O, dtype)
    return F.linear(cast(x_NI, dtype), restore(way, stored, dtype), bias_O)


def product_back(grad_NO: Tensor, way: str | None, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the gradient of a linear layer's input, (N, I) in `dtype`: the output's times the weight."""
    if _in_8_bits(way, grad_NO, stored):
        return cast(eight_bit.multiply_back(grad_NO, *stored), dtype)
    return torch.mm(cast(grad_NO, dtype), restore(way, stored, dtype))


def add_product_back(total_NI: Tensor, grad_NO: Tensor, way: str | None, stored: Sequence[Tensor]) -> None:
    """Add what `product_back` returns to `total_NI`, in whose dtype it is multiplied."""
    dtype = total_NI.dtype
    if _in_8_bits(way, grad_NO, stored):
        total_NI.add_(product_back(grad_NO, way, stored, dtype))
    else:
        total_NI.addmm_(cast(grad_NO, dtype), restore(way, stored, dtype))


def _in_8_bits(way: str | None, rows: Tensor, stored: Sequence[Tensor]) -> bool:
    return way is not None and way.endswith(_IN_8_BITS) and eight_bit.suits_rows(len(rows))


def stored_form(layer: nn.Linear) -> tuple[str | None, tuple[Tensor, ...]]:
    """Return the way in which a layer's weight is stored and used, and the tensors, for the functions above.

    None is the weight itself, and a scheme's name that of `SCHEMES`, with an ending for products in 8 bits.
    """
    return (layer.way, layer.stored) if isinstance(layer, QuantLinear) else (None, (layer.weight,))


class QuantLinear(Linear):
    """A linear layer with a quantised, frozen weight. `weight` is restored anew each time it is asked for.

    Made on the meta device, like any layer that is to be loaded; `quantise` or `take` fill it.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, scheme: str) -> None:
        """Raises ConfigError for an odd width that a 4-bit scheme cannot group."""
        check_width(scheme, in_features)
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.scheme = scheme
        self.multiplies_in_8_bits = False
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        stored = SCHEMES[scheme].pack(torch.empty(out_features, in_features))
        for name, tensor in zip(STORED[scheme], stored, strict=True):
            self.register_buffer(name, tensor)

    @property
    def way(self) -> str:
        """See `stored_form`."""
        return self.scheme + _IN_8_BITS if self.multiplies_in_8_bits else self.scheme

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that stand for the weight."""
        return tuple(self.get_buffer(name) for name in STORED[self.scheme])

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), restored in fp32."""
        return restore(self.scheme, self.stored, torch.float32)

    @torch.no_grad()
    def quantise(self, weight_OI: Tensor, device: torch.device) -> float:
        """Store `weight_OI`, quantised on its own device, on `device`.

        Returns the relative error: the norm of the difference over the norm of the weight; 0 on meta.
        """
        stored = SCHEMES[self.scheme].pack(weight_OI)
        if weight_OI.is_meta:
            self.take(stored)
            return 0.0
        wide_OI = weight_OI.float()
        error = (restore(self.scheme, stored, torch.float32) - wide_OI).norm() / wide_OI.norm().clamp_min(
            _TINY
        )
        self.take([tensor.to(device) for tensor in stored])
        return error.item()

    def take(self, stored: Sequence[Tensor]) -> None:
        """Use tensors that `Scheme.pack` made."""
        for name, tensor in zip(STORED[self.scheme], stored, strict=True):
            self._buffers[name] = tensor

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return _QuantProduct.apply(x, self.bias, layer_dtype(x), self.way, self.stored)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{super().extra_repr()}, scheme={self.way}"


class _QuantProduct(torch.autograd.Function):
    """`F.linear` with a stored weight, which is restored again in backward. Only x gets a gradient."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        way: str,
        stored: tuple[Tensor, ...],
    ) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.dtype, ctx.way = dtype, way
        y_NO = product(x.reshape(-1, x.shape[-1]), way, stored, bias, dtype)
        return y_NO.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows_NO = grad.reshape(-1, grad.shape[-1])
        grad_x = product_back(rows_NO, ctx.way, ctx.saved_tensors, ctx.dtype).to(grad.dtype)
        return grad_x.view(*grad.shape[:-1], -1), None, None, None, None


def use_quant_layers(model: nn.Module, paths: Sequence[str], scheme: str) -> None:
    """Replace the linear layers of `model` (on the meta device) at `paths` by quantised ones, still empty."""
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        layer = model.get_submodule(path)
        with torch.device("meta"):
            quantised = QuantLinear(layer.in_features, layer.out_features, layer.bias is not None, scheme)
        setattr(model.get_submodule(parent), leaf, quantised)


@dataclass(frozen=True)
class In8Bits:
    """How many layers of a model multiply their codes as they are, and how far the products are from those
    with restored weights.

    others: how many quantised layers do not, because of their widths. error: the largest relative one, over
    the first layer of each size, for normally distributed numbers: the norm of the difference over the norm;
    0 on meta.
    """

    layers: int
    others: int
    error: float


def multiply_in_8_bits(model: nn.Module) -> In8Bits:
    """Let the quantised layers of a model multiply their codes as they are, if kernels take their widths."""
    count, sizes = 0, dict[tuple[int, int], QuantLinear]()
    quantised = quant_layers(model).values()
    for layer in quantised:
        size = layer.out_features, layer.in_features
        layer.multiplies_in_8_bits = eight_bit.suits_widths(*size)
        if layer.multiplies_in_8_bits:
            count += 1
            sizes.setdefault(size, layer)
    known = [layer for layer in sizes.values() if not layer.stored[0].is_meta]
    return In8Bits(count, len(quantised) - count, max(map(_error_of_products, known), default=0.0))


@torch.no_grad()
def _error_of_products(layer: QuantLinear) -> float:
    draw = torch.Generator().manual_seed(0)
    x_NI = torch.randn(64, layer.in_features, generator=draw).to(layer.stored[0].device)
    exact_NO = product(x_NI, layer.scheme, layer.stored, None, torch.float32)
    y_NO = product(x_NI, layer.way, layer.stored, None, torch.float32)
    return ((y_NO - exact_NO).norm() / exact_NO.norm().clamp_min(_TINY)).item()


def quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Return the quantised layers of a model, by the names of their weights."""
    return {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, QuantLinear)}


def stored_names(model: nn.Module) -> list[str]:
    """Return the names of the tensors that stand for weights in a model."""
    layers = ((path, m) for path, m in model.named_modules() if isinstance(m, QuantLinear))
    return [f"{path}.{name}" for path, layer in layers for name in STORED[layer.scheme]]


def _largest_of_rows(weight_OI: Tensor) -> Tensor:
    """Return the largest absolute value of each row (O, 1), in fp32 and never 0."""
    return weight_OI.float().abs().amax(1, keepdim=True).clamp_min(_TINY)


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
    # Compiled code has the table among its constants. One without content may be of a mode that soon ends.
    if torch.compiler.is_compiling() or packed.device.type == "meta":
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
