"""What a feed-forward does between its products: SwiGLU, GELU.

The value is several times as wide as the model. So nothing is kept for backward but what linear layers made,
and a layer that reads the value may have it made again bit by bit where it needs it, see `Activation.back`.

Shape legend: T packed tokens of all samples, F features of the feed-forward's middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from library.nn.kernels import fused
from library.nn.layers import row_blocks
from library.nn.running.recompute import cheap
from library.nn.stand_in import device_kind

Use = Callable[[Tensor, slice], None]
ALL = slice(None)


@dataclass(frozen=True)
class Activation:
    """A function between two products.

    value: the function, for autograd.
    back: called with its inputs, its result's gradient (T, F), and a function: makes the value again, some
        rows at a time, and hands over these and which ones they are; returns the inputs' gradients. The
        gradient that it was given is overwritten.
    """

    value: Callable[..., Tensor]
    back: Callable[[tuple[Tensor, ...], Tensor, Use], tuple[Tensor, ...]]


# ---- SwiGLU ----


def plain_swiglu(a_TF: Tensor, b_TF: Tensor) -> Tensor:
    """silu(a) * b."""
    return F.silu(a_TF) * b_TF


def swiglu(a_TF: Tensor, b_TF: Tensor) -> Tensor:
    """Return silu(a) * b. Nothing is kept for backward but a and b, which linear layers made."""
    if torch.compiler.is_compiling():
        return plain_swiglu(a_TF, b_TF)
    return cheap(fused("swiglu", _SwiGLU.apply), a_TF, b_TF)


class _SwiGLU(torch.autograd.Function):
    """silu(a) * b on any device."""

    @staticmethod
    def forward(ctx: FunctionCtx, a_TF: Tensor, b_TF: Tensor) -> Tensor:
        ctx.save_for_backward(a_TF, b_TF)
        if device_kind(a_TF) != "cpu":
            return F.silu(a_TF).mul_(b_TF)
        y_TF = torch.empty_like(a_TF)
        for rows in _blocks(a_TF):
            torch.mul(F.silu(a_TF[rows]), b_TF[rows], out=y_TF[rows])
        return y_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_TF: Tensor) -> tuple[Tensor | None, ...]:
        a_TF, b_TF = ctx.saved_tensors
        grad_a_TF, grad_b_TF = torch.empty_like(a_TF), torch.empty_like(b_TF)
        for rows in _blocks(a_TF):
            a, grad, grad_a, grad_b = (cut(x, rows) for x in (a_TF, grad_TF, grad_a_TF, grad_b_TF))
            torch.ops.aten.silu.out(a, out=grad_a)  # its room serves for what lies in between, too
            torch.mul(grad_a, grad, out=grad_b)
            torch.mul(grad, cut(b_TF, rows), out=grad_a)
            torch.ops.aten.silu_backward.grad_input(grad_a, a, grad_input=grad_a)
        return grad_a_TF, grad_b_TF


def swiglu_back(inputs: tuple[Tensor, ...], grad_TF: Tensor, use: Use) -> tuple[Tensor, ...]:
    """See `Activation.back`."""
    return fused("swiglu_back", _swiglu_back)(inputs, grad_TF, use)


def _swiglu_back(inputs: tuple[Tensor, ...], grad_TF: Tensor, use: Use) -> tuple[Tensor, ...]:
    a_TF, b_TF = inputs
    grad_b_TF = torch.empty_like(b_TF) if device_kind(a_TF) == "cpu" else None
    for rows in _blocks(a_TF):
        a, b, grad = (cut(x, rows) for x in (a_TF, b_TF, grad_TF))
        silu = F.silu(a)
        use(silu * b, rows)
        if grad_b_TF is None:
            grad_b_TF = silu.mul_(grad)  # of all rows, so its memory serves
        else:
            torch.mul(silu, grad, out=grad_b_TF[rows])
        grad.mul_(b)
        torch.ops.aten.silu_backward.grad_input(grad, a, grad_input=grad)
    return grad_TF, grad_b_TF


# ---- GELU ----


def gelu(x_TF: Tensor) -> Tensor:
    """Return the exact GELU of x. Nothing is kept for backward but x, which a linear layer made."""
    return cheap(F.gelu, x_TF)


def gelu_back(inputs: tuple[Tensor, ...], grad_TF: Tensor, use: Use) -> tuple[Tensor, ...]:
    """See `Activation.back`."""
    (x_TF,) = inputs
    for rows in _blocks(x_TF):
        x, grad = cut(x_TF, rows), cut(grad_TF, rows)
        use(F.gelu(x), rows)
        torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    return (grad_TF,)


# ---- none ----


def identity_back(inputs: tuple[Tensor, ...], grad_TF: Tensor, use: Use) -> tuple[Tensor, ...]:
    """See `Activation.back`."""
    use(inputs[0], ALL)
    return (grad_TF,)


# ---- shared ----

SWIGLU = Activation(swiglu, swiglu_back)
GELU = Activation(gelu, gelu_back)
IDENTITY = Activation(lambda x_TF: x_TF, identity_back)


def cut(x: Tensor, rows: slice) -> Tensor:
    """Return rows of x; x itself, if they are all, which is not as slow as a slice."""
    return x if rows == ALL else x[rows]


def _blocks(x_TF: Tensor) -> Iterator[slice]:
    """Cut rows into blocks, one at least: on the CPU such as stay in its cache, else all of them at once."""
    if device_kind(x_TF) != "cpu" or not len(x_TF):
        return iter((ALL,))
    return (rows for rows, _ in row_blocks((len(x_TF),), x_TF[0].numel()))
