"""Linear layers that read one input, with a LoRA on each, and the activation before them, as one autograd
operation.

    y = W x + b + factor * up (down x)      for each of the layers

Notable facts:
- The low-rank parts are accumulated into the base layers' outputs in place, and the input's gradient is
  accumulated over all layers: no second tensor of either width is ever made. Kept for backward are only x and
  the rank-wide `down x`.
- Of an activation its inputs are kept. Backward reads the value only to multiply it with something thin, so
  it is made again along with the inputs' gradients: on the CPU some rows at a time, never as a whole.
- All `down` are multiplied with x as one matrix, and their gradients come out of one product.
- A factor that is a number is left to the products, which scale what they add up for nothing.
- `low_rank` and plain `F.linear` are the reference implementation; tests hold the fast one against it.
- LoRA weights are fp32 and are cast to the activations' dtype inside the operation.

Shape legend: N rows (tokens, or samples), I in features, O out features, R rank, S ranks of all layers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from library.nn.activations import ALL, IDENTITY, Activation, cut
from library.nn.products import cast
from library.nn.running.compiling import unshared
from library.nn.stand_in import device_kind
from library.nn.weights.quant import add_product_back, product, product_back


class Constants(NamedTuple):
    """What gets no gradient: bias and weight of the base layer, this one in stored form
    (`quant.stored_form`), and the LoRA's factor, a number, or (N, R), or (1, R)."""

    bias_O: Tensor | None
    factor: float | Tensor
    way: str | None
    stored: tuple[Tensor, ...]


class LoRAOperand(NamedTuple):
    """One of the layers, with its LoRA: `down` (R, I) and `up` (O, R)."""

    down: Tensor
    up: Tensor
    constants: Constants


def linear_with_loras(
    inputs: Sequence[Tensor],
    layers: Sequence[LoRAOperand],
    dtype: torch.dtype,
    activation: Activation = IDENTITY,
) -> tuple[Tensor, ...]:
    """Return `F.linear(x, weight, bias) + low_rank(x, down, up, factor)` of each layer, computed in `dtype`,
    where x is `activation` of the inputs.

    The base layers are constant: weights and biases get no gradient. Each weight is used in the same way
    forward and backward.
    """
    downs, ups, constants = zip(*layers, strict=True)
    return _LinearWithLoRAs.apply(dtype, activation, constants, *inputs, *downs, *ups)


def low_rank(x_NI: Tensor, down: Tensor, up: Tensor, factor: float | Tensor) -> Tensor:
    """Return what a LoRA adds to a linear layer's output (N, O), in plain operations.

    Args:
        down: (R, I). up: (O, R). Both are cast to the dtype of x.
        factor: multiplied into `down x`: a number, or (N, R), or (1, R).
    """
    return F.linear(F.linear(x_NI, down.to(x_NI.dtype)) * factor, up.to(x_NI.dtype))


class _LinearWithLoRAs(torch.autograd.Function):
    """See `linear_with_loras`. Autograd does not look into lists, so what may want a gradient is in none."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        dtype: torch.dtype,
        activation: Activation,
        constants: Sequence[Constants],
        *flat: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(constants)
        inputs, downs, ups = flat[: -2 * count], flat[-2 * count : -count], flat[-count:]
        value_NI = activation.value(*inputs)
        x_NI = cast(value_NI, dtype)
        down_SI = cast(_joined(downs, dim=0), dtype)
        h_NS = F.linear(x_NI, down_SI)
        ups, outputs = [cast(up, dtype) for up in ups], []
        for layer, up_OR, h_NR in zip(constants, ups, _of_layers(h_NS, ups, dim=1), strict=True):
            if isinstance(layer.factor, Tensor):
                h_NR.mul_(layer.factor)
            y_NO = product(x_NI, layer.way, layer.stored, layer.bias_O, dtype)
            y_NO.addmm_(h_NR, up_OR.t(), alpha=_number(layer.factor))
            outputs.append(unshared(cast(y_NO, value_NI.dtype)))
        stored = [tensor for layer in constants for tensor in layer.stored]
        ctx.save_for_backward(*inputs, down_SI, h_NS, *ups, *stored)
        ctx.dtype, ctx.activation, ctx.count = dtype, activation, len(inputs)
        ctx.ways = [(layer.way, len(layer.stored)) for layer in constants]
        ctx.lora_dtype, ctx.factors = downs[0].dtype, [layer.factor for layer in constants]
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dtype, ways, count, saved = ctx.dtype, ctx.ways, ctx.count, ctx.saved_tensors
        inputs, (down_SI, h_NS, *others) = saved[:count], saved[count:]
        ups, stored = others[: len(ways)], others[len(ways) :]
        hs_NR, grads_NO = _of_layers(h_NS, ups, dim=1), [cast(grad, dtype) for grad in grads]
        grad_h_NS = _grad_of_h(grads_NO, hs_NR, ups, ctx.factors)
        trained = any(ctx.needs_input_grad[_FIRST + count :])
        of_parts: list[Tensor] = []

        def multiply(x_NI: Tensor, rows: slice) -> None:
            if trained:
                of_parts.append(torch.mm(cut(grad_h_NS, rows).t(), cast(x_NI, dtype)))

        if any(ctx.needs_input_grad[_FIRST : _FIRST + count]):
            grad_x_NI = _through_base_layers(grads_NO, ways, stored, dtype).addmm_(grad_h_NS, down_SI)
            grads_in = ctx.activation.back(inputs, cast(grad_x_NI, inputs[0].dtype), multiply)
        else:
            multiply(ctx.activation.value(*inputs), ALL)
            grads_in = (None,) * count
        if not trained:
            return *_NO_GRADS, *grads_in, *(None,) * (2 * len(ups))
        grad_down_SI = cast(functools.reduce(Tensor.add_, of_parts), ctx.lora_dtype)
        grads_up = [
            cast(_grad_of_up(*of_layer), ctx.lora_dtype)
            for of_layer in zip(grads_NO, hs_NR, ups, ctx.factors, strict=True)
        ]
        return *_NO_GRADS, *grads_in, *_of_layers(grad_down_SI, ups, dim=0), *grads_up


_FIRST = 3  # of the arguments that are tensors
_NO_GRADS = (None,) * _FIRST


def _grad_of_h(
    grads_NO: Sequence[Tensor],
    hs_NR: Sequence[Tensor],
    ups: Sequence[Tensor],
    factors: Sequence[float | Tensor],
) -> Tensor:
    """Return the gradient of `down x`, (N, S)."""
    parts = []
    for grad_NO, h_NR, up_OR, factor in zip(grads_NO, hs_NR, ups, factors, strict=True):
        part_NR = _scaled_mm(grad_NO, up_OR, _number(factor), h_NR)
        parts.append(part_NR.mul_(factor) if isinstance(factor, Tensor) else part_NR)
    return _joined(parts, dim=1)


def _grad_of_up(grad_NO: Tensor, h_NR: Tensor, up_OR: Tensor, factor: float | Tensor) -> Tensor:
    """Return the gradient of `up`, (O, R), as autograd keeps it: of any other order it would make a copy.

    The CPU takes that copy and is faster where the wide matrix is not transposed.
    """
    if device_kind(grad_NO) != "cpu":
        return _scaled_mm(grad_NO.t(), h_NR, _number(factor), up_OR)
    return _scaled_mm(h_NR.t(), grad_NO, _number(factor), up_OR.t()).t()


def _through_base_layers(
    grads_NO: Sequence[Tensor],
    ways: Sequence[tuple[str | None, int]],
    stored: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient of x without the LoRAs, (N, I)."""
    tensors, grad_x_NI = iter(stored), None
    for grad_NO, (way, parts) in zip(grads_NO, ways, strict=True):
        weight = tuple(itertools.islice(tensors, parts))
        if grad_x_NI is None:
            grad_x_NI = product_back(grad_NO, way, weight, dtype)
        else:
            add_product_back(grad_x_NI, grad_NO, way, weight)
    return grad_x_NI


def _number(factor: float | Tensor) -> float:
    """Return the factor that products have to apply."""
    return 1.0 if isinstance(factor, Tensor) else factor


def _scaled_mm(a: Tensor, b: Tensor, scale: float, like: Tensor) -> Tensor:
    """Return scale * a b, from one kernel. `like` has its shape: at beta=0 it is not read."""
    return torch.addmm(like, a, b, beta=0, alpha=scale)


def _joined(matrices: Sequence[Tensor], dim: int) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim)


def _of_layers(joined: Tensor, ups: Sequence[Tensor], dim: int) -> Sequence[Tensor]:
    """Return each layer's part of what has the ranks of all of them along a dimension."""
    return (joined,) if len(ups) == 1 else joined.split_with_sizes([up_OR.shape[1] for up_OR in ups], dim)
