"""Frozen weights in 8 or 4 bits, and a linear layer that multiplies with them.

A weight is kept as codes and scales; for a product it is restored to the dtype of the activations, used, and
dropped, forward as backward. So the stored form is all that a quantised model occupies, and nothing but the
stored form is kept for backward. Codes of 8 bits can be multiplied as they are, see `eight_bit.py`.

Shape legend: N rows, I in features, O out features, G groups of an output row, S weights of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from library.nn.products import Linear, cast, layer_dtype
from library.nn.weights import eight_bit
from library.nn.weights.schemes import SCHEMES, TINY
from library.options.quant import STORED, check_width

_IN_8_BITS = " in 8 bits"  # ends the name of a scheme whose codes are multiplied as they are


def restore(
    way: str | None, stored: Sequence[Tensor], dtype: torch.dtype, *, after: Tensor | None = None
) -> Tensor:
    """Return the weight (O, I) that tensors stand for: themselves, without a scheme.

    after: in backward, the gradient that the weight is to be multiplied with. What a compiler can make
    without it, it would make in forward, and keep: all weights of the model, as they were.
    """
    if way is None:
        return cast(stored[0], dtype)
    scheme = way.removesuffix(_IN_8_BITS)
    if torch.compiler.is_compiling():
        return _restored(list(stored), scheme, dtype, after)
    return SCHEMES[scheme].unpack(stored, dtype)


@torch.library.custom_op(
    "flow_scripts::restored",
    mutates_args=(),
    schema="(Tensor[] stored, str scheme, ScalarType dtype, Tensor? after=None) -> Tensor",
)
def _restored(
    stored: Sequence[Tensor], scheme: str, dtype: torch.dtype, after: Tensor | None = None
) -> Tensor:
    """Restore a weight in compiled code, which cannot see how that is done."""
    return SCHEMES[scheme].unpack(stored, dtype)


@_restored.register_fake
def _(stored: Sequence[Tensor], scheme: str, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
    rows, columns = stored[0].shape
    return stored[0].new_empty(rows, columns * SCHEMES[scheme].codes_each, dtype=dtype)


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
    return torch.mm(cast(grad_NO, dtype), restore(way, stored, dtype, after=grad_NO))


def add_product_back(total_NI: Tensor, grad_NO: Tensor, way: str | None, stored: Sequence[Tensor]) -> None:
    """Add what `product_back` returns to `total_NI`, in whose dtype it is multiplied."""
    dtype = total_NI.dtype
    if _in_8_bits(way, grad_NO, stored):
        total_NI.add_(product_back(grad_NO, way, stored, dtype))
    else:
        total_NI.addmm_(cast(grad_NO, dtype), restore(way, stored, dtype, after=grad_NO))


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
            TINY
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
    return ((y_NO - exact_NO).norm() / exact_NO.norm().clamp_min(TINY)).item()


def quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Return the quantised layers of a model, by the names of their weights."""
    return {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, QuantLinear)}


def stored_names(model: nn.Module) -> list[str]:
    """Return the names of the tensors that stand for weights in a model."""
    layers = ((path, m) for path, m in model.named_modules() if isinstance(m, QuantLinear))
    return [f"{path}.{name}" for path, layer in layers for name in STORED[layer.scheme]]
