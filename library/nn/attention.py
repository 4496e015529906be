"""Attention over packed sequences: the tokens of all samples lie end to end, and each sample attends to
itself alone.

There is no padding and no mask. Keys and values may have fewer heads than queries (grouped queries); they
are not repeated. Kernels:

- `sdpa`: torch's scaled_dot_product_attention, one call a sample. Every device and dtype.
- `varlen`: torch.nn.attention.varlen, one call a batch. CUDA, bf16 or fp16.
- `flash`: the flash-attn package, one call a batch. CUDA, bf16 or fp16.
- `auto`: `varlen` where it can be used and the batch has several samples, else `sdpa`.

Shape legend: T packed tokens, H query heads, K key/value heads, D features of a head.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from library.core.errors import ConfigError, MissingPackageError
from library.nn.products import product_dtype

KERNELS = ("auto", "sdpa", "varlen", "flash")
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Packing:
    """Where the samples of a packed batch lie.

    lengths: tokens of each sample. ends: (B + 1,) int32 on the device, 0 and each sample's end; CUDA only.
    """

    lengths: tuple[int, ...]
    ends: Tensor | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        """Describe a batch; on CUDA the ends are copied without waiting for the device."""
        if device.type != "cuda":
            return cls(tuple(lengths))
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).pin_memory()
        return cls(tuple(lengths), ends.to(device, non_blocking=True))


def check_kernel(kernel: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a kernel that cannot work, before anything is computed.

    Raises:
        ConfigError: an unknown kernel, or one that the device or dtype does not support.
        MissingPackageError: `flash` without the flash-attn package.
    """
    if kernel not in KERNELS:
        raise ConfigError(f"There is no attention kernel '{kernel}'; choose one of {', '.join(KERNELS)}.")
    if kernel == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise MissingPackageError("flash_attn", "Attention kernel 'flash'", "flash-attn --no-build-isolation")
    if kernel in ("flash", "varlen") and (device.type != "cuda" or dtype not in _HALF):
        raise ConfigError(
            f"Attention kernel '{kernel}' needs a CUDA device and bf16 or fp16, not {device.type} and "
            f"{dtype}; use 'sdpa'."
        )


def attention(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, packing: Packing, kernel: str = "auto") -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v within each sample, (T, H * D)."""
    return _choose(q_THD, packing, kernel)(q_THD, k_TKD, v_TKD, packing).flatten(1)


def plain_attention(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, packing: Packing) -> Tensor:
    """The formula, written out for one sample after another; returns (T, H, D). Reference for the kernels."""
    groups = q_THD.shape[1] // k_TKD.shape[1]
    parts = []
    for q, k, v in _samples(q_THD, k_TKD, v_TKD, packing):
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores_HTT = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        parts.append(torch.einsum("hqk,khd->qhd", scores_HTT.softmax(-1), v))
    return torch.cat(parts)


_Kernel = Callable[[Tensor, Tensor, Tensor, Packing], Tensor]


def _choose(q_THD: Tensor, packing: Packing, kernel: str) -> _Kernel:
    if kernel == "auto":
        # torch's varlen kernel is written for NVIDIA; a single sample is best left to SDPA's choice
        able = q_THD.is_cuda and torch.version.cuda is not None and q_THD.dtype in _HALF
        kernel = "varlen" if able and len(packing.lengths) > 1 and _has_flash(q_THD.device) else "sdpa"
    return {"sdpa": _sdpa, "varlen": _varlen, "flash": _flash}[kernel]


def _has_flash(device: torch.device) -> bool:
    """torch's flash kernels begin with the Ampere generation (compute capability 8.0)."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _sdpa(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, packing: Packing) -> Tensor:
    dtype, grouped = product_dtype(q_THD), q_THD.shape[1] != k_TKD.shape[1]
    parts = []
    for sample in _samples(q_THD, k_TKD, v_TKD, packing):
        q_1HTD, k_1KTD, v_1KTD = (x.to(dtype).transpose(0, 1).unsqueeze(0) for x in sample)
        out_1HTD = F.scaled_dot_product_attention(q_1HTD, k_1KTD, v_1KTD, enable_gqa=grouped)
        parts.append(out_1HTD.squeeze(0).transpose(0, 1).to(q_THD.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _varlen(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, packing: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = packing.ends, max(packing.lengths)
    grouped = q_THD.shape[1] != k_TKD.shape[1]
    return varlen_attn(q_THD, k_TKD, v_TKD, ends, ends, longest, longest, enable_gqa=grouped)


def _flash(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, packing: Packing) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    ends, longest = packing.ends, max(packing.lengths)
    return flash_attn_varlen_func(q_THD, k_TKD, v_TKD, ends, ends, longest, longest)


def _samples(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> zip[tuple[Tensor, Tensor, Tensor]]:
    lengths = list(packing.lengths)
    return zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
