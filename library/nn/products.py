"""In which dtype matrix products are computed, and linear and convolution layers that do so.

Many processors multiply fp32 matrices faster than bf16 ones: those without bf16 instructions, where the
product is emulated, and those whose bf16 instructions are slow (Intel's AVX512-BF16 without AMX runs at
half the fp32 rate). There half-precision factors are widened to fp32 (which is exact), multiplied, and the
result is rounded once. That is at least as accurate as a half-precision product with fp32 accumulation, and
faster; only the factors at hand are ever wide.

The choice is a rule on the processor's capabilities and not a timing, so that a run repeats bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from library.nn.running.compiling import unshared
from library.nn.stand_in import device_kind

_CPU = dict(torch.cpu.get_capabilities())  # read here, where torch.compile takes it for the constant it is
_FEWEST_ROWS = 32  # below, widening the weight costs more than the faster product wins


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which products of `x` with other matrices of its dtype are computed fastest."""
    if device_kind(x) != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return x.dtype
    return x.dtype if _cpu_is_fast_in(x.dtype) else torch.float32


def layer_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer multiplies `x`: `product_dtype`, if x has enough rows."""
    dtype = product_dtype(x)
    if dtype == x.dtype:  # first, so that compiled code does not depend on the number of rows for nothing
        return dtype
    return x.dtype if x.numel() // x.shape[-1] < _FEWEST_ROWS else dtype


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a dtype, in ordinary order if it is a copy. `Tensor.to` is slow to find nothing to do."""
    return x if x.dtype == dtype else x.to(dtype, memory_format=torch.contiguous_format)


def _cpu_is_fast_in(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of a half-precision dtype faster than fp32 ones."""
    if dtype == torch.float16:
        return bool(_CPU.get("amx_fp16"))
    if _CPU.get("architecture") != "x86_64":
        return bool(_CPU.get("bf16") or _CPU.get("sve_bf16"))
    return bool(_CPU.get("amx_bf16") or (_CPU.get("avx512_bf16") and "AMD" in str(_CPU.get("cpu_name"))))


class Linear(nn.Linear):
    """`nn.Linear` that multiplies in `layer_dtype`. Input and output have the dtype of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if layer_dtype(x) == x.dtype:
            return F.linear(x, self.weight, self.bias)
        return _WideLinear.apply(x, self.weight, self.bias)


class Fp32Linear(Linear):
    """A linear layer that takes, computes and returns fp32, in whatever dtype its weight is kept.

    Backward widens the weight again, so that no wide copy is kept.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        x = cast(x, torch.promote_types(x.dtype, torch.float32))
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight, self.bias)
        return _WideLinear.apply(x, self.weight, self.bias)


class _WideLinear(torch.autograd.Function):
    """`F.linear` through fp32. The input is kept for backward only when the weight needs a gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight else None, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        wide_bias = None if bias is None else bias.float()
        return unshared(F.linear(x.float(), weight.float(), wide_bias).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        wide = grad.float()
        rows = wide.flatten(0, -2)
        grad_x = (wide @ weight.float()).to(grad.dtype) if need_x else None
        grad_weight = (rows.t() @ x.float().flatten(0, -2)).to(weight.dtype) if need_weight else None
        grad_bias = rows.sum(0).to(ctx.bias_dtype) if need_bias else None
        return grad_x, grad_weight, grad_bias


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` that multiplies in `product_dtype`. Input and output are in the weight's dtype."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H', W')."""
        dtype = product_dtype(x_BCHW)
        if dtype == x_BCHW.dtype:
            return super().forward(x_BCHW)
        bias = None if self.bias is None else self.bias.to(dtype)
        wide = self._conv_forward(x_BCHW.to(dtype), self.weight.to(dtype), bias)
        return wide.to(x_BCHW.dtype)
