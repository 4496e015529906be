"""What a timestep does to a block that is modulated as in DiT: a layer norm that is scaled and shifted, and a
gate before the sum with the residual stream.

As in `library.nn.layers`, each `plain_*` function is the reference and what `torch.compile` sees. The
function without `plain_` computes the same in fp32 and rounds once; for backward it keeps its inputs in their
own dtype and one or two numbers a row. Gains, shifts and gates have one row a sample; they get gradients if
they want them.

Shape legend: T packed tokens of all samples, B samples, D features, F of the feed-forward's middle.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from library.nn.kernels import fused
from library.nn.layers import layer_norm_backward, row_blocks, wide
from library.nn.packing import Packing, by_sample, spread
from library.nn.products import Fp32Linear, cast
from library.nn.running.recompute import cheap, run_again_in_backward
from library.nn.stand_in import device_kind


class LayerNorm(nn.Module):
    """Weight, bias and epsilon of a layer norm; `modulated_layer_norm` applies them."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x_TD: Tensor, packing: Packing) -> Tensor:
        """(T, D) -> (T, D)."""
        dtype = wide(self.weight)
        gain_1D, shift_1D = self.weight.to(dtype).unsqueeze(0), self.bias.to(dtype).unsqueeze(0)
        return modulated_layer_norm(x_TD, gain_1D, shift_1D, packing, self.eps)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{len(self.weight)}, eps={self.eps:g}"


class Modulation(nn.Module):
    """A linear layer from the time embedding to shifts, scales and gates, in fp32."""

    def __init__(self, time_dim: int, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.out_layer = Fp32Linear(time_dim, count * dim)

    def forward(self, activated_BE: Tensor) -> tuple[Tensor, ...]:
        """`activated_BE`: silu of the time embedding. Returns `count` tensors (B, D)."""
        return self.out_layer(activated_BE).chunk(self.count, dim=1)


# ---- layer norm, scaled and shifted ----


def plain_modulated_layer_norm(
    x_TD: Tensor, gain_BD: Tensor, shift_BD: Tensor, packing: Packing, eps: float
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * gain + shift, each sample with its own rows of gain and shift."""
    normed_TD = F.layer_norm(x_TD.to(wide(x_TD)), x_TD.shape[-1:], eps=eps)
    gain, shift = (_of_each_token(rows_BD, packing, len(x_TD)) for rows_BD in (gain_BD, shift_BD))
    return (normed_TD * gain + shift).to(x_TD.dtype)


def modulated_layer_norm(
    x_TD: Tensor, gain_BD: Tensor, shift_BD: Tensor, packing: Packing, eps: float
) -> Tensor:
    """Return the layer norm of x times gain plus shift, in the dtype of x.

    Args:
        gain_BD, shift_BD: fp32, one row a sample, or a single row for all.
        packing: which tokens are whose.
    """
    function = fused("modulated_layer_norm", _modulated_layer_norm)
    return cheap(function, x_TD, gain_BD, shift_BD, packing, eps)


def _modulated_layer_norm(
    x_TD: Tensor, gain_BD: Tensor, shift_BD: Tensor, packing: Packing, eps: float
) -> Tensor:
    if torch.compiler.is_compiling():
        return plain_modulated_layer_norm(x_TD, gain_BD, shift_BD, packing, eps)
    by_hand = _BY_HAND.get(device_kind(x_TD))
    if by_hand is not None:
        return by_hand(x_TD, gain_BD, shift_BD, packing.lengths, eps)
    plain = functools.partial(plain_modulated_layer_norm, packing=packing, eps=eps)
    return run_again_in_backward(plain, x_TD, gain_BD, shift_BD)


class _ModulatedLayerNorm(torch.autograd.Function):
    """On the CPU: torch's kernel with a weight and bias for each sample. It takes half precision beside fp32
    rows. Keeps x, gain, shift and two numbers a row."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_TD: Tensor,
        gain_BD: Tensor,
        shift_BD: Tensor,
        lengths: tuple[int, ...],
        eps: float,
    ) -> Tensor:
        lengths = _lengths(x_TD, gain_BD, lengths)
        parts = []
        for x, gain, shift in zip(x_TD.split(lengths), gain_BD, shift_BD, strict=True):
            parts.append(torch.native_layer_norm(x, x.shape[-1:], gain, shift, eps))
        y_TD, mean_T1, rstd_T1 = (_joined(tensors) for tensors in zip(*parts, strict=True))
        ctx.save_for_backward(x_TD, gain_BD, shift_BD, mean_T1, rstd_T1)
        ctx.lengths = lengths
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gain_BD, shift_BD, *statistics = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        parts = []
        packed = (t.split(ctx.lengths) for t in (grad_TD, x_TD, *statistics))
        for grad, x, mean, rstd, gain, shift in zip(*packed, gain_BD, shift_BD, strict=True):
            parts.append(layer_norm_backward(grad, x, x.shape[-1:], mean, rstd, gain, shift, wanted))
        grads_x, grads_gain, grads_shift = zip(*parts, strict=True)
        return (
            _joined(grads_x) if wanted[0] else None,
            torch.stack(grads_gain) if wanted[1] else None,
            torch.stack(grads_shift) if wanted[2] else None,
            None,
            None,
        )


class _ModulatedLayerNormOnGPU(torch.autograd.Function):
    """On GPUs: torch's kernel without weight and bias, one for all samples, in fp32, then gain and shift in
    another one, which rounds. Keeps the same."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_TD: Tensor,
        gain_BD: Tensor,
        shift_BD: Tensor,
        lengths: tuple[int, ...],
        eps: float,
    ) -> Tensor:
        wide_TD = cast(x_TD, wide(x_TD))
        normed_TD, mean_T1, rstd_T1 = torch.native_layer_norm(wide_TD, x_TD.shape[-1:], None, None, eps)
        y_TD = torch.empty_like(x_TD)
        for gain, shift, normed, y in by_sample(lengths, (gain_BD, shift_BD), (normed_TD, y_TD)):
            torch.addcmul(shift, normed, gain, out=y)
        ctx.save_for_backward(x_TD, gain_BD, shift_BD, mean_T1, rstd_T1)
        ctx.lengths = lengths
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gain_BD, shift_BD, *statistics = ctx.saved_tensors
        need_x, need_gain, need_shift, _, _ = ctx.needs_input_grad
        wide_TD, width = cast(x_TD, wide(x_TD)), x_TD.shape[-1:]
        grad_x_TD = grad_gain_BD = grad_shift_BD = None
        if need_x:
            inner_TD = torch.empty_like(wide_TD)
            for gain, grad, inner in by_sample(ctx.lengths, (gain_BD,), (grad_TD, inner_TD)):
                torch.mul(grad, gain, out=inner)
            without = (None, None, [True, False, False])
            grad_x_TD, _, _ = layer_norm_backward(inner_TD, wide_TD, width, *statistics, *without)
            grad_x_TD = cast(grad_x_TD, x_TD.dtype)
        if need_gain or need_shift:
            lengths, wanted = _lengths(x_TD, gain_BD, ctx.lengths), [False, need_gain, need_shift]
            packed = (t.split(lengths) for t in (cast(grad_TD, wide_TD.dtype), wide_TD, *statistics))
            parts = [
                layer_norm_backward(grad, x, width, mean, rstd, gain, shift, wanted)
                for grad, x, mean, rstd, gain, shift in zip(*packed, gain_BD, shift_BD, strict=True)
            ]
            _, grads_gain, grads_shift = zip(*parts, strict=True)
            grad_gain_BD = torch.stack(grads_gain) if need_gain else None
            grad_shift_BD = torch.stack(grads_shift) if need_shift else None
        return grad_x_TD, grad_gain_BD, grad_shift_BD, None, None


_BY_HAND = {"cpu": _ModulatedLayerNorm.apply, "cuda": _ModulatedLayerNormOnGPU.apply}  # by kind of device


# ---- the gate before the sum with the residual stream ----


def plain_gated_residual(stream_TD: Tensor, x_TD: Tensor, gate_BD: Tensor, packing: Packing) -> Tensor:
    """stream + gate * x."""
    gate = _of_each_token(gate_BD, packing, len(x_TD))
    return (stream_TD.to(wide(stream_TD)) + gate * x_TD).to(stream_TD.dtype)


def gated_residual(stream_TD: Tensor, x_TD: Tensor, gate_BD: Tensor, packing: Packing) -> Tensor:
    """Return stream + gate * x, in the dtype of the stream.

    Args:
        gate_BD: fp32, one row a sample, or a single row for all.
        packing: which tokens are whose.
    """
    if torch.compiler.is_compiling():
        return plain_gated_residual(stream_TD, x_TD, gate_BD, packing)
    return cheap(fused("gated_residual", _GatedResidual.apply), stream_TD, x_TD, gate_BD, packing)


class _GatedResidual(torch.autograd.Function):
    """stream + gate * x on any device. Keeps the gate, and x only if the gate wants a gradient."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, stream_TD: Tensor, x_TD: Tensor, gate_BD: Tensor, packing: Packing
    ) -> Tensor:
        y_TD = torch.empty_like(stream_TD)
        for gate, stream, x, y in _pieces(packing.lengths, gate_BD, stream_TD, x_TD, y_TD):
            torch.addcmul(stream, x, gate, out=y)
        ctx.save_for_backward(x_TD if ctx.needs_input_grad[2] else None, gate_BD)
        ctx.lengths = packing.lengths
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_BD = ctx.saved_tensors
        need_stream, need_x, need_gate, _ = ctx.needs_input_grad
        grad_x_TD = grad_gate_BD = None
        if need_x:
            grad_x_TD = torch.empty_like(grad_TD)
            for gate, grad, grad_x in _pieces(ctx.lengths, gate_BD, grad_TD, grad_x_TD):
                torch.mul(grad, gate, out=grad_x)
        if need_gate:
            grad_gate_BD = torch.zeros_like(gate_BD)
            for rows, sample in _blocks_of_samples(_lengths(x_TD, gate_BD, ctx.lengths), x_TD):
                grad_gate_BD[sample] += (grad_TD[rows].to(gate_BD.dtype) * x_TD[rows]).sum(0)
        return grad_TD if need_stream else None, grad_x_TD, grad_gate_BD, None


# ---- shared ----


def _of_each_token(rows_BD: Tensor, packing: Packing, tokens: int) -> Tensor:
    return rows_BD if len(rows_BD) == 1 else spread(rows_BD, packing, tokens)


def _lengths(x_TD: Tensor, rows_BD: Tensor, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """How many tokens have each row."""
    return (len(x_TD),) if len(rows_BD) == 1 else lengths


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _blocks_of_samples(lengths: tuple[int, ...], x_TD: Tensor) -> Iterator[tuple[slice, int]]:
    """Cut tokens where samples end, and on the CPU more finely: temporaries stay in its cache."""
    return row_blocks(lengths, x_TD.shape[-1] if device_kind(x_TD) == "cpu" else 1)


def _pieces(lengths: tuple[int, ...], rows_BD: Tensor, *packed: Tensor) -> Iterable[Sequence[Tensor]]:
    """Return what is to be computed at once: a row, then the tokens that it is for. On the CPU those are few,
    see `_blocks_of_samples`."""
    if device_kind(rows_BD) != "cpu":
        return by_sample(lengths, (rows_BD,), packed)
    blocks = _blocks_of_samples(_lengths(packed[0], rows_BD, lengths), packed[0])
    return ((rows_BD[sample], *(x_TD[rows] for x_TD in packed)) for rows, sample in blocks)
