"""Triton kernels for what `library.nn.layers` and `library.nn.activations` define: RMS norms, queries and
keys, SwiGLU.

Each kernel reads its inputs once, computes in fp32 and rounds where the functions written by hand there do.
For backward the same is kept: inputs, and one number a row.

Shape legend: as there.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from library.nn.activations import ALL, Use
from library.nn.packing import Packing
from library.nn.triton_kernels.launch import (
    added_up,
    launch,
    parts,
    row_shape,
    rows_apart,
    rows_of_program,
    sample_stride,
    sums_of_tiles,
    tiles,
)

_ROWS = 4  # that share one reading of a gain
_ROWS_ADDED_UP = 16  # by a program before it writes its sum
_TOKENS, _HEADS = 16, 8  # that share one reading of a gain and of the rotary table
_ELEMENTS = 1024  # of a program without rows


# ---- x / rms(x) * gain (+ stream) ----


def scaled_rms_norm(x_TD: Tensor, gain_BD: Tensor, packing: Packing, eps: float) -> Tensor:
    """See `library.nn.layers.scaled_rms_norm`."""
    return _RMSNorm.apply(x_TD, gain_BD, None, packing, eps)


def normed_residual(stream_TD: Tensor, x_TD: Tensor, gain_BD: Tensor, packing: Packing, eps: float) -> Tensor:
    """See `library.nn.layers.normed_residual`."""
    return _RMSNorm.apply(x_TD, gain_BD, stream_TD, packing, eps)


@triton.jit
def _rms_forward(
    x_ptr,
    gain_ptr,
    stream_ptr,
    y_ptr,
    rstd_ptr,
    ends_ptr,
    x_stride,
    gain_stride,
    stream_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """rstd = 1 / sqrt(mean(x^2) + eps); y = x rstd gain (+ stream)."""
    feature = tl.arange(0, BLOCK)
    inside = feature < WIDTH
    gain = tl.load(gain_ptr + tl.program_id(1) * gain_stride + feature, inside, other=0.0).to(tl.float32)
    first, end = rows_of_program(ends_ptr, ROWS)
    for row in range(first, end):
        x = tl.load(x_ptr + row * x_stride + feature, inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x) / WIDTH + eps)
        y = x * rstd * gain
        if stream_ptr is not None:
            y += tl.load(stream_ptr + row * stream_stride + feature, inside, other=0.0).to(tl.float32)
        tl.store(rstd_ptr + row, rstd)
        tl.store(y_ptr + row * WIDTH + feature, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _rms_backward(
    grad_ptr,
    x_ptr,
    gain_ptr,
    rstd_ptr,
    ends_ptr,
    grad_x_ptr,
    sums_ptr,
    grad_stride,
    x_stride,
    gain_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """With g = grad gain: grad_x = rstd (g - x rstd^2 mean(g x)); grad_gain = sum of grad x rstd."""
    feature = tl.arange(0, BLOCK)
    inside = feature < WIDTH
    sample = tl.program_id(1)
    gain = tl.load(gain_ptr + sample * gain_stride + feature, inside, other=0.0).to(tl.float32)
    grad_gain = tl.zeros((BLOCK,), tl.float32)
    first, end = rows_of_program(ends_ptr, ROWS)
    for row in range(first, end):
        x = tl.load(x_ptr + row * x_stride + feature, inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + feature, inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        if grad_x_ptr is not None:
            g = grad * gain
            along = tl.sum(g * x) * (rstd * rstd * rstd) / WIDTH
            grad_x = g * rstd - x * along
            tl.store(grad_x_ptr + row * WIDTH + feature, grad_x.to(grad_x_ptr.dtype.element_ty), inside)
        if sums_ptr is not None:
            grad_gain += x * rstd * grad
    if sums_ptr is not None:
        place = sample.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(sums_ptr + place * WIDTH + feature, grad_gain, inside)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * gain (+ stream). Keeps x, the gain and one number a row."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_TD: Tensor,
        gain_BD: Tensor,
        stream_TD: Tensor | None,
        packing: Packing,
        eps: float,
    ) -> Tensor:
        x_TD, gain_BD = rows_apart(x_TD), rows_apart(gain_BD)
        stream_TD = None if stream_TD is None else rows_apart(stream_TD)
        y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
        rstd_T = x_TD.new_empty(len(x_TD), dtype=torch.float32)
        launch(
            _rms_forward,
            tiles(packing, _ROWS),
            *(x_TD, gain_BD, stream_TD, y_TD, rstd_T, packing.ends),
            *(x_TD.stride(0), sample_stride(gain_BD), 0 if stream_TD is None else stream_TD.stride(0), eps),
            ROWS=_ROWS,
            **row_shape(x_TD.shape[1]),
        )
        ctx.save_for_backward(x_TD, gain_BD, rstd_T)
        ctx.packing = packing
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gain_BD, rstd_T = ctx.saved_tensors
        need_x, need_gain, need_stream, _, _ = ctx.needs_input_grad
        rows = _ROWS_ADDED_UP if need_gain else _ROWS
        grid = tiles(ctx.packing, rows)
        grad_x_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format) if need_x else None
        sums_BND = sums_of_tiles(grid, gain_BD) if need_gain else None
        if need_x or need_gain:
            apart_TD = rows_apart(grad_TD)
            launch(
                _rms_backward,
                grid,
                *(apart_TD, x_TD, gain_BD, rstd_T, ctx.packing.ends, grad_x_TD, sums_BND),
                *(apart_TD.stride(0), x_TD.stride(0), sample_stride(gain_BD)),
                ROWS=rows,
                **row_shape(x_TD.shape[1]),
            )
        return grad_x_TD, added_up(sums_BND, gain_BD), grad_TD if need_stream else None, None, None


# ---- SwiGLU ----


def swiglu(a_TF: Tensor, b_TF: Tensor) -> Tensor:
    """See `library.nn.activations.swiglu`."""
    return _SwiGLU.apply(a_TF, b_TF)


@triton.jit
def _swiglu_forward(a_ptr, b_ptr, y_ptr, count, BLOCK: tl.constexpr):
    """y = silu(a) b, rounded after silu too."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    a = tl.load(a_ptr + place, inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + place, inside, other=0.0).to(tl.float32)
    silu = (a * tl.sigmoid(a)).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + place, (silu * b).to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _swiglu_backward(grad_ptr, a_ptr, b_ptr, grad_a_ptr, grad_b_ptr, y_ptr, count, BLOCK: tl.constexpr):
    """grad_b = silu(a) grad; grad_a = (grad b) s (1 + a (1 - s)), with s the sigmoid of a. And y."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    grad = tl.load(grad_ptr + place, inside, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + place, inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + place, inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    silu = (a * s).to(grad_b_ptr.dtype.element_ty).to(tl.float32)
    if y_ptr is not None:
        tl.store(y_ptr + place, (silu * b).to(y_ptr.dtype.element_ty), inside)
    tl.store(grad_b_ptr + place, (silu * grad).to(grad_b_ptr.dtype.element_ty), inside)
    grad_silu = (grad * b).to(grad_a_ptr.dtype.element_ty).to(tl.float32)
    grad_a = grad_silu * s * (1.0 + a * (1.0 - s))
    tl.store(grad_a_ptr + place, grad_a.to(grad_a_ptr.dtype.element_ty), inside)


class _SwiGLU(torch.autograd.Function):
    """silu(a) * b. Keeps a and b."""

    @staticmethod
    def forward(ctx: FunctionCtx, a_TF: Tensor, b_TF: Tensor) -> Tensor:
        a_TF, b_TF = a_TF.contiguous(), b_TF.contiguous()
        y_TF = torch.empty_like(a_TF)
        launch(_swiglu_forward, _elements(a_TF), a_TF, b_TF, y_TF, a_TF.numel(), BLOCK=_ELEMENTS)
        ctx.save_for_backward(a_TF, b_TF)
        return y_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_TF: Tensor) -> tuple[Tensor, Tensor]:
        return _swiglu_grads(*ctx.saved_tensors, grad_TF, None)


def swiglu_back(inputs: tuple[Tensor, ...], grad_TF: Tensor, use: Use) -> tuple[Tensor, ...]:
    """See `library.nn.activations.swiglu_back`."""
    y_TF = torch.empty(grad_TF.shape, dtype=grad_TF.dtype, device=grad_TF.device)
    grads = _swiglu_grads(*inputs, grad_TF, y_TF)
    use(y_TF, ALL)
    return grads


def _swiglu_grads(a_TF: Tensor, b_TF: Tensor, grad_TF: Tensor, y_TF: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients. If there is a `y_TF`, silu(a) * b is written to it, and grad_a over `grad_TF`."""
    a_TF, b_TF, grad_TF = a_TF.contiguous(), b_TF.contiguous(), grad_TF.contiguous()
    grad_a_TF = torch.empty_like(a_TF) if y_TF is None else grad_TF
    grad_b_TF = torch.empty_like(b_TF)
    launch(
        _swiglu_backward,
        _elements(a_TF),
        *(grad_TF, a_TF, b_TF, grad_a_TF, grad_b_TF, y_TF, a_TF.numel()),
        BLOCK=_ELEMENTS,
    )
    return grad_a_TF, grad_b_TF


def _elements(x: Tensor) -> tuple[int]:
    return (parts(x.numel(), _ELEMENTS),)


# ---- queries and keys: a norm a head, then the rotary embedding ----


def norm_and_rotate(x_THF: Tensor, gain_HF: Tensor, table_TP2: Tensor | None, eps: float) -> Tensor:
    """See `library.nn.layers.norm_and_rotate`."""
    return _NormAndRotate.apply(x_THF, gain_HF, table_TP2, eps)


@triton.jit
def _turned(x, cos, sin, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Each pair (even, odd) turned: (even cos - odd sin, even sin + odd cos)."""
    even, odd = tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, BLOCK))


@triton.jit(do_not_specialize=["tokens"])  # or a batch of 16 n tokens would be a reason to compile again
def _rotate_forward(
    x_ptr,
    gain_ptr,
    table_ptr,
    y_ptr,
    rstd_ptr,
    tokens,
    heads,
    x_stride,
    x_head_stride,
    gain_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """rstd = 1 / sqrt(mean(x^2) + eps) of a head; y = x rstd gain, turned by the token's angles."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.arange(0, BLOCK)
    there = token < tokens
    inside = there[:, None] & (feature < WIDTH)[None, :]
    if table_ptr is not None:
        table = tl.load(table_ptr + token[:, None] * WIDTH + feature[None, :], inside, other=0.0)
        cos, sin = tl.split(tl.reshape(table, (TOKENS, BLOCK // 2, 2)))
    first = tl.program_id(1) * HEADS
    for head in range(first, tl.minimum(first + HEADS, heads)):
        gain = tl.load(gain_ptr + head * gain_stride + feature, feature < WIDTH, other=0.0).to(tl.float32)
        place = token[:, None] * x_stride + head * x_head_stride + feature[None, :]
        x = tl.load(x_ptr + place, inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
        y = x * rstd[:, None] * gain[None, :]
        if table_ptr is not None:
            y = _turned(y, cos, sin, TOKENS, BLOCK)
        row = token * heads + head
        tl.store(rstd_ptr + row, rstd, there)
        tl.store(y_ptr + row[:, None] * WIDTH + feature[None, :], y.to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens"])  # or a batch of 16 n tokens would be a reason to compile again
def _rotate_backward(
    grad_ptr,
    x_ptr,
    gain_ptr,
    table_ptr,
    rstd_ptr,
    grad_x_ptr,
    sums_ptr,
    tokens,
    heads,
    grad_stride,
    grad_head_stride,
    x_stride,
    x_head_stride,
    gain_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The gradient, turned back by the angles, goes through the norm as in `_rms_backward`."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.arange(0, BLOCK)
    there = token < tokens
    inside = there[:, None] & (feature < WIDTH)[None, :]
    if table_ptr is not None:
        table = tl.load(table_ptr + token[:, None] * WIDTH + feature[None, :], inside, other=0.0)
        cos, sin = tl.split(tl.reshape(table, (TOKENS, BLOCK // 2, 2)))
    first = tl.program_id(1) * HEADS
    for head in range(first, tl.minimum(first + HEADS, heads)):
        gain = tl.load(gain_ptr + head * gain_stride + feature, feature < WIDTH, other=0.0).to(tl.float32)
        row = token * heads + head
        rstd = tl.load(rstd_ptr + row, there, other=0.0)[:, None]
        place = token[:, None] * x_stride + head * x_head_stride + feature[None, :]
        x = tl.load(x_ptr + place, inside, other=0.0).to(tl.float32)
        place = token[:, None] * grad_stride + head * grad_head_stride + feature[None, :]
        grad = tl.load(grad_ptr + place, inside, other=0.0).to(tl.float32)
        if table_ptr is not None:
            grad = _turned(grad, cos, -sin, TOKENS, BLOCK)
        if grad_x_ptr is not None:
            g = grad * gain[None, :]
            along = tl.sum(g * x, 1)[:, None] * (rstd * rstd * rstd) / WIDTH
            grad_x = (g * rstd - x * along).to(grad_x_ptr.dtype.element_ty)
            tl.store(grad_x_ptr + row[:, None] * WIDTH + feature[None, :], grad_x, inside)
        if sums_ptr is not None:
            place = (tl.program_id(0).to(tl.int64) * heads + head) * WIDTH + feature
            tl.store(sums_ptr + place, tl.sum(x * rstd * grad, 0), feature < WIDTH)


class _NormAndRotate(torch.autograd.Function):
    """rotate(x / rms(x) * gain). Keeps x, the gain, the table and one number a head and token."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x_THF: Tensor, gain_HF: Tensor, table_TP2: Tensor | None, eps: float
    ) -> Tensor:
        x_THF, gain_HF = rows_apart(x_THF), rows_apart(gain_HF)
        table_TP2 = None if table_TP2 is None else table_TP2.contiguous()
        tokens, heads, _ = x_THF.shape
        y_THF = torch.empty_like(x_THF, memory_format=torch.contiguous_format)
        rstd_TH = x_THF.new_empty(tokens, heads, dtype=torch.float32)
        launch(
            _rotate_forward,
            _head_tiles(x_THF),
            *(x_THF, gain_HF, table_TP2, y_THF, rstd_TH, tokens, heads),
            *(x_THF.stride(0), x_THF.stride(1), gain_HF.stride(0), eps),
            **_head_shape(x_THF.shape[2]),
        )
        ctx.save_for_backward(x_THF, gain_HF, table_TP2, rstd_TH)
        return y_THF

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_THF: Tensor) -> tuple[Tensor | None, ...]:
        x_THF, gain_HF, table_TP2, rstd_TH = ctx.saved_tensors
        need_x, need_gain, _, _ = ctx.needs_input_grad
        tokens, heads, _ = x_THF.shape
        grid = _head_tiles(x_THF)
        grad_THF = rows_apart(grad_THF)
        grad_x_THF = torch.empty_like(x_THF, memory_format=torch.contiguous_format) if need_x else None
        sums_NHF = x_THF.new_empty(grid[0], *gain_HF.shape, dtype=torch.float32) if need_gain else None
        launch(
            _rotate_backward,
            grid,
            *(grad_THF, x_THF, gain_HF, table_TP2, rstd_TH, grad_x_THF, sums_NHF, tokens, heads),
            *(grad_THF.stride(0), grad_THF.stride(1), x_THF.stride(0), x_THF.stride(1), gain_HF.stride(0)),
            **_head_shape(x_THF.shape[2]),
        )
        return grad_x_THF, sums_NHF.sum(0) if need_gain else None, None, None


def _head_tiles(x_THF: Tensor) -> tuple[int, int]:
    return parts(x_THF.shape[0], _TOKENS), parts(x_THF.shape[1], _HEADS)


@functools.cache
def _head_shape(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "TOKENS": _TOKENS, "HEADS": _HEADS, "num_warps": 4}
