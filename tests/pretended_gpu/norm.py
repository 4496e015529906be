"""The pretended GPU's RMS norm: torch has a kernel for CUDA that keeps the input and one number a row, and
none for the CPU, where it goes through operations that keep more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.pretended_gpu.memory import on_cpu, used

_library = torch.library.Library("aten", "IMPL")  # its kernels are there as long as it is


def install() -> None:
    """Register the kernels."""
    _library.impl("_fused_rms_norm", _forward, "CUDA")
    _library.impl("_fused_rms_norm_backward", _backward, "CUDA")


def _forward(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    rows = x.shape[: x.dim() - len(shape)]
    result, rstd = torch.empty_like(x), x.new_empty((*rows, *(1 for _ in shape)), dtype=_wide(x))
    used("rms_norm", _given(x, weight), (result, rstd))
    wide = on_cpu(x).to(rstd.dtype)
    squares = wide.square().mean(_last(shape), keepdim=True)
    found = on_cpu(rstd).copy_((squares + (torch.finfo(rstd.dtype).eps if eps is None else eps)).rsqrt())
    on_cpu(result).copy_(wide * found if weight is None else wide * found * on_cpu(weight))
    return result, rstd


def _backward(
    grad: Tensor, x: Tensor, shape: Sequence[int], rstd: Tensor, weight: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    grad_x = torch.empty_like(x) if wanted[0] else None
    grad_weight = torch.empty_like(weight) if wanted[1] and weight is not None else None
    used("rms_norm's backward", _given(grad, x, rstd, weight), _given(grad_x, grad_weight))
    r = on_cpu(rstd)
    normed, back = on_cpu(x).to(r.dtype) * r, on_cpu(grad).to(r.dtype)
    if grad_weight is not None:
        rows = tuple(range(x.dim() - len(shape)))
        on_cpu(grad_weight).copy_((back * normed).sum(rows))
    if grad_x is not None:
        back = back if weight is None else back * on_cpu(weight)
        on_cpu(grad_x).copy_((back - normed * (back * normed).mean(_last(shape), keepdim=True)) * r)
    return grad_x, grad_weight


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _last(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(-len(shape), 0))


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]
