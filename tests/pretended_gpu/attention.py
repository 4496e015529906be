"""The pretended GPU's attention: torch's operations for CUDA, computed by torch's kernel for the CPU.

Shape legend: B batch, H query heads, K key/value heads, T and S tokens of queries and of keys, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.pretended_gpu.memory import on_cpu, used

_library = torch.library.Library("aten", "IMPL")  # its kernels are there as long as it is


def install() -> None:
    """Register the kernels."""
    for key in ("CUDA", "AutogradCUDA"):
        _library.impl("scaled_dot_product_attention", _sdpa, key, allow_override=True)
    for name, kernel in {
        "_scaled_dot_product_flash_attention": _flash,
        "_scaled_dot_product_flash_attention_backward": _flash_backward,
        "_scaled_dot_product_efficient_attention": _efficient,
        "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
        "_flash_attention_forward": _varlen,
        "_flash_attention_backward": _varlen_backward,
    }.items():
        _library.impl(name, kernel, "CUDA")


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Choose as torch does: flash attention in half precision without a mask, else the efficient kernel."""
    assert q.shape[1] == k.shape[1] or enable_gqa, "grouped queries that nobody told of"
    if q.dtype != torch.float32 and attn_mask is None:
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        return attend(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


# ---- one sequence length: (B, H, T, D) ----


def _flash(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[object, ...]:  # fmt: skip
    assert q.dtype != torch.float32, "flash attention is for half precision"
    out, sums = _attended(q, k, v, _How(is_causal, scale))
    none = q.new_empty(0)
    return out, sums, None, None, q.shape[2], k.shape[2], none, none, none


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, q_ends: object, k_ends: object,
    longest_q: int, longest_k: int, dropout_p: float, is_causal: bool, *_: object, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _gradients(grad, q, k, v, out, sums, _How(is_causal, scale))


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, compute_log_sumexp: bool, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert q.shape[1] == k.shape[1], "the efficient kernel takes no grouped queries"
    none = torch.empty((), dtype=torch.int64)
    return *_attended(q, k, v, _How(is_causal, scale, bias)), none, none


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, sums: Tensor,
    seed: Tensor, offset: Tensor, dropout_p: float, wanted: Sequence[bool], is_causal: bool = False, *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    return *_gradients(grad, q, k, v, out, sums, _How(is_causal, scale, bias)), None


@dataclass(frozen=True)
class _How:
    is_causal: bool
    scale: float | None
    bias: Tensor | None = None

    def settings(self) -> dict[str, object]:
        bias = None if self.bias is None else on_cpu(self.bias)
        return {"is_causal": self.is_causal, "attn_mask": bias, "scale": self.scale}


def _attended(q: Tensor, k: Tensor, v: Tensor, how: _How) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)
    sums = torch.empty(q.shape[:3], device=q.device)
    used("attention", reads=(q, k, v), writes=(out, sums))
    _forward(*map(on_cpu, (q, k, v, out, sums)), **how.settings())
    return out, sums


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, how: _How
) -> tuple[Tensor, ...]:
    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    used("attention's backward", reads=(grad, q, k, v, out, sums), writes=grads)
    _backward(*map(on_cpu, (grad, q, k, v, out, sums)), [on_cpu(x) for x in grads], **how.settings())
    return grads


# ---- many lengths: (T, H, D), and where each sequence ends ----


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, longest_q: int, longest_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None, **_: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert q.dtype != torch.float32 and q_ends.dtype == k_ends.dtype == torch.int32
    out = torch.empty_like(q)
    sums = torch.empty(q.shape[1], q.shape[0], device=q.device)
    used("attention", reads=(q, k, v, q_ends, k_ends), writes=(out, sums))
    tensors = [on_cpu(x) for x in (q, k, v, out)]
    for queries, keys in _sequences(q_ends, k_ends, longest_q, longest_k):
        one = [
            x[rows].transpose(0, 1)[None]
            for x, rows in zip(tensors, (queries, keys, keys, queries), strict=True)
        ]
        _forward(*one, on_cpu(sums)[None, :, queries], scale=scale)
    none = torch.empty(0, device=q.device)
    return out, sums, none, none, none


def _varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, q_ends: Tensor, k_ends: Tensor,
    longest_q: int, longest_k: int, dropout_p: float, is_causal: bool, *_: object, scale: float | None = None,
    **__: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    used("attention's backward", reads=(grad, q, k, v, out, sums, q_ends, k_ends), writes=grads)
    tensors = [on_cpu(x) for x in (grad, q, k, v, out, *grads)]
    for queries, keys in _sequences(q_ends, k_ends, longest_q, longest_k):
        places = (queries, queries, keys, keys, queries, queries, keys, keys)
        one = [x[rows].transpose(0, 1)[None] for x, rows in zip(tensors, places, strict=True)]
        _backward(*one[:5], on_cpu(sums)[None, :, queries], one[5:], scale=scale)
    return grads


def _sequences(
    q_ends: Tensor, k_ends: Tensor, longest_q: int, longest_k: int
) -> Iterator[tuple[slice, slice]]:
    pairs = [list(map(slice, ends[:-1], ends[1:])) for ends in (on_cpu(x).tolist() for x in (q_ends, k_ends))]
    for queries, keys in zip(*pairs, strict=True):
        assert queries.stop - queries.start <= longest_q and keys.stop - keys.start <= longest_k
        yield queries, keys


# ---- on the CPU ----


def _forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, **settings: object) -> None:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result, found = attend(q, *_for_each_query(q, k, v), 0.0, **settings)
    out.copy_(result)
    sums.copy_(found)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, grads: Iterable[Tensor],
    is_causal: bool = False, **settings: object,
) -> None:  # fmt: skip
    differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = differentiate(grad, q, *_for_each_query(q, k, v), out, sums, 0.0, is_causal, **settings)
    for target, gradient in zip(grads, found, strict=True):
        groups = gradient.unflatten(1, (target.shape[1], -1))
        target.copy_(groups[:, :, 0] if groups.shape[2] == 1 else groups.sum(2))


def _for_each_query(q: Tensor, *others: Tensor) -> list[Tensor]:
    return [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in others]
