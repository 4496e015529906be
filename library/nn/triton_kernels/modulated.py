"""Triton kernels for what `library.nn.modulated` defines: layer norms that are scaled and shifted, and gates.

Each kernel reads its inputs once, computes in fp32 and rounds once. For backward the same is kept as by the
functions written by hand there. GELU has none: torch's own is one kernel each way and keeps its input only.

Shape legend: as there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from library.nn.packing import Packing
from library.nn.triton_kernels.launch import (
    added_up,
    launch,
    row_shape,
    rows_apart,
    rows_of_program,
    sample_stride,
    sums_of_tiles,
    tiles,
)

_ROWS = 4  # that share one reading of a gain, shift or gate
_ROWS_ADDED_UP = 16  # by a program before it writes its sums


# ---- layer norm, scaled and shifted ----


def modulated_layer_norm(
    x_TD: Tensor, gain_BD: Tensor, shift_BD: Tensor, packing: Packing, eps: float
) -> Tensor:
    """See `library.nn.modulated.modulated_layer_norm`."""
    return _ModulatedLayerNorm.apply(x_TD, gain_BD, shift_BD, packing, eps)


@triton.jit
def _layer_forward(
    x_ptr,
    gain_ptr,
    shift_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    ends_ptr,
    x_stride,
    gain_stride,
    shift_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """rstd = 1 / sqrt(variance + eps); y = (x - mean) rstd gain + shift."""
    feature = tl.arange(0, BLOCK)
    inside = feature < WIDTH
    sample = tl.program_id(1)
    gain = tl.load(gain_ptr + sample * gain_stride + feature, inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + sample * shift_stride + feature, inside, other=0.0).to(tl.float32)
    first, end = rows_of_program(ends_ptr, ROWS)
    for row in range(first, end):
        x = tl.load(x_ptr + row * x_stride + feature, inside, other=0.0).to(tl.float32)
        mean = tl.sum(x) / WIDTH
        centred = tl.where(inside, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred) / WIDTH + eps)
        y = centred * rstd * gain + shift
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
        tl.store(y_ptr + row * WIDTH + feature, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _layer_backward(
    grad_ptr,
    x_ptr,
    gain_ptr,
    mean_ptr,
    rstd_ptr,
    ends_ptr,
    grad_x_ptr,
    gain_sums_ptr,
    shift_sums_ptr,
    grad_stride,
    x_stride,
    gain_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """With n = (x - mean) rstd and g = grad gain: grad_x = rstd (g - mean(g) - n mean(g n)).

    grad_gain is the sum of grad n, and grad_shift that of grad.
    """
    feature = tl.arange(0, BLOCK)
    inside = feature < WIDTH
    sample = tl.program_id(1)
    gain = tl.load(gain_ptr + sample * gain_stride + feature, inside, other=0.0).to(tl.float32)
    grad_gain = tl.zeros((BLOCK,), tl.float32)
    grad_shift = tl.zeros((BLOCK,), tl.float32)
    first, end = rows_of_program(ends_ptr, ROWS)
    for row in range(first, end):
        x = tl.load(x_ptr + row * x_stride + feature, inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + feature, inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.where(inside, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        if grad_x_ptr is not None:
            g = grad * gain
            grad_x = rstd * (g - tl.sum(g) / WIDTH - normed * (tl.sum(g * normed) / WIDTH))
            tl.store(grad_x_ptr + row * WIDTH + feature, grad_x.to(grad_x_ptr.dtype.element_ty), inside)
        if gain_sums_ptr is not None:
            grad_gain += grad * normed
        if shift_sums_ptr is not None:
            grad_shift += grad
    place = (sample.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * WIDTH + feature
    if gain_sums_ptr is not None:
        tl.store(gain_sums_ptr + place, grad_gain, inside)
    if shift_sums_ptr is not None:
        tl.store(shift_sums_ptr + place, grad_shift, inside)


class _ModulatedLayerNorm(torch.autograd.Function):
    """(x - mean) * rstd * gain + shift. Keeps x, the gain and two numbers a row."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x_TD: Tensor, gain_BD: Tensor, shift_BD: Tensor, packing: Packing, eps: float
    ) -> Tensor:
        x_TD, gain_BD, shift_BD = (rows_apart(t) for t in (x_TD, gain_BD, shift_BD))
        y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
        mean_T, rstd_T = (x_TD.new_empty(len(x_TD), dtype=torch.float32) for _ in range(2))
        launch(
            _layer_forward,
            tiles(packing, _ROWS),
            *(x_TD, gain_BD, shift_BD, y_TD, mean_T, rstd_T, packing.ends),
            *(x_TD.stride(0), sample_stride(gain_BD), sample_stride(shift_BD), eps),
            ROWS=_ROWS,
            **row_shape(x_TD.shape[1]),
        )
        ctx.save_for_backward(x_TD, gain_BD, mean_T, rstd_T)
        ctx.packing = packing
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gain_BD, mean_T, rstd_T = ctx.saved_tensors
        need_x, need_gain, need_shift, _, _ = ctx.needs_input_grad
        rows = _ROWS_ADDED_UP if need_gain or need_shift else _ROWS
        grid = tiles(ctx.packing, rows)
        grad_TD = rows_apart(grad_TD)
        grad_x_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format) if need_x else None
        gain_sums_BND = sums_of_tiles(grid, gain_BD) if need_gain else None
        shift_sums_BND = sums_of_tiles(grid, gain_BD) if need_shift else None
        launch(
            _layer_backward,
            grid,
            *(grad_TD, x_TD, gain_BD, mean_T, rstd_T, ctx.packing.ends),
            *(grad_x_TD, gain_sums_BND, shift_sums_BND),
            *(grad_TD.stride(0), x_TD.stride(0), sample_stride(gain_BD)),
            ROWS=rows,
            **row_shape(x_TD.shape[1]),
        )
        return grad_x_TD, added_up(gain_sums_BND, gain_BD), added_up(shift_sums_BND, gain_BD), None, None


# ---- the gate before the sum with the residual stream ----


def gated_residual(stream_TD: Tensor, x_TD: Tensor, gate_BD: Tensor, packing: Packing) -> Tensor:
    """See `library.nn.modulated.gated_residual`."""
    return _GatedResidual.apply(stream_TD, x_TD, gate_BD, packing)


@triton.jit
def _gate_forward(
    stream_ptr,
    x_ptr,
    gate_ptr,
    y_ptr,
    ends_ptr,
    stream_stride,
    x_stride,
    gate_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y = stream + gate x."""
    feature = tl.arange(0, BLOCK)
    inside = feature < WIDTH
    gate = tl.load(gate_ptr + tl.program_id(1) * gate_stride + feature, inside, other=0.0).to(tl.float32)
    first, end = rows_of_program(ends_ptr, ROWS)
    for row in range(first, end):
        stream = tl.load(stream_ptr + row * stream_stride + feature, inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + feature, inside, other=0.0).to(tl.float32)
        y = stream + gate * x
        tl.store(y_ptr + row * WIDTH + feature, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _gate_backward(
    grad_ptr,
    x_ptr,
    gate_ptr,
    ends_ptr,
    grad_x_ptr,
    sums_ptr,
    grad_stride,
    x_stride,
    gate_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """grad_x = grad gate; grad_gate = sum of grad x."""
    feature = tl.arange(0, BLOCK)
    inside = feature < WIDTH
    sample = tl.program_id(1)
    gate = tl.load(gate_ptr + sample * gate_stride + feature, inside, other=0.0).to(tl.float32)
    grad_gate = tl.zeros((BLOCK,), tl.float32)
    first, end = rows_of_program(ends_ptr, ROWS)
    for row in range(first, end):
        grad = tl.load(grad_ptr + row * grad_stride + feature, inside, other=0.0).to(tl.float32)
        if grad_x_ptr is not None:
            grad_x = (grad * gate).to(grad_x_ptr.dtype.element_ty)
            tl.store(grad_x_ptr + row * WIDTH + feature, grad_x, inside)
        if sums_ptr is not None:
            x = tl.load(x_ptr + row * x_stride + feature, inside, other=0.0).to(tl.float32)
            grad_gate += grad * x
    if sums_ptr is not None:
        place = sample.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(sums_ptr + place * WIDTH + feature, grad_gate, inside)


class _GatedResidual(torch.autograd.Function):
    """stream + gate * x. Keeps the gate, and x only if the gate wants a gradient."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, stream_TD: Tensor, x_TD: Tensor, gate_BD: Tensor, packing: Packing
    ) -> Tensor:
        stream_TD, x_TD, gate_BD = (rows_apart(t) for t in (stream_TD, x_TD, gate_BD))
        y_TD = torch.empty_like(stream_TD, memory_format=torch.contiguous_format)
        launch(
            _gate_forward,
            tiles(packing, _ROWS),
            *(stream_TD, x_TD, gate_BD, y_TD, packing.ends),
            *(stream_TD.stride(0), x_TD.stride(0), sample_stride(gate_BD)),
            ROWS=_ROWS,
            **row_shape(x_TD.shape[1]),
        )
        ctx.save_for_backward(x_TD if ctx.needs_input_grad[2] else None, gate_BD)
        ctx.packing = packing
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_BD = ctx.saved_tensors
        need_stream, need_x, need_gate, _ = ctx.needs_input_grad
        rows = _ROWS_ADDED_UP if need_gate else _ROWS
        grid = tiles(ctx.packing, rows)
        grad_x_TD = torch.empty_like(grad_TD, memory_format=torch.contiguous_format) if need_x else None
        sums_BND = sums_of_tiles(grid, gate_BD) if need_gate else None
        if need_x or need_gate:
            apart_TD = rows_apart(grad_TD)
            launch(
                _gate_backward,
                grid,
                *(apart_TD, x_TD, gate_BD, ctx.packing.ends, grad_x_TD, sums_BND),
                *(apart_TD.stride(0), 0 if x_TD is None else x_TD.stride(0), sample_stride(gate_BD)),
                ROWS=rows,
                **row_shape(gate_BD.shape[1]),
            )
        return grad_TD if need_stream else None, grad_x_TD, added_up(sums_BND, gate_BD), None
