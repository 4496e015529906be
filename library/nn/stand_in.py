"""What kind of device a computation is for: the tensor's own, or the one that the meta device stands in for.

Some operations are done in another way on the CPU than on a GPU. What a step takes of a GPU's memory is found
out on the meta device (`library.training.look`), where the GPU's way must be gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_stands_for: ContextVar[str] = ContextVar("stands_for", default="cuda")


def device_kind(x: Tensor) -> str:
    """Return "cuda", "cpu" or whatever else the computation of `x` is to be chosen for."""
    return _stands_for.get() if x.is_meta else x.device.type


@contextmanager
def meta_standing_for(kind: str) -> Iterator[None]:
    """Let tensors of the meta device be computed as they are on devices of this kind."""
    token = _stands_for.set(kind)
    try:
        yield
    finally:
        _stands_for.reset(token)


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """Return x / rms(x) over the last dimension (* weight), in whatever way torch has for the device.

    The weight has the dtype of x: otherwise torch does without its kernel.
    """
    if x.is_meta and device_kind(x) == "cuda":
        return _RMSNormOnGPU.apply(x, weight)  # torch would do without the kernel, and keep more
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class _RMSNormOnGPU(torch.autograd.Function):
    """What torch's kernel for GPUs makes and keeps, without content: the result, and one number a row."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad
        return torch.empty_like(x) if need_x else None, torch.empty_like(weight) if need_weight else None
