"""The memory-bound parts of a transformer block: norms, normed residuals, query and key preparation.

Each `plain_*` function is the reference: it says what is computed, and it is what `torch.compile` gets to
see. The function of the same name without `plain_` computes the same and keeps less for backward: its
inputs, and whatever is one number a row. Where that is faster it is written out by hand, in fp32 inside and
rounded once, on the CPU some rows at a time so that temporaries stay in the cache; elsewhere the plain
function runs again in backward. Their results are `cheap` to make again, see `library.nn.running.recompute`.

Norm weights enter as a `gain` that callers make with ordinary operations, so they get gradients if they
want them.

Shape legend: T packed tokens of all samples, B samples, D features, F features of the feed-forward's middle
or of one head, H heads, P pairs of features of a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from library.nn.kernels import fused
from library.nn.packing import Packing, by_sample, spread
from library.nn.products import cast
from library.nn.rope import rotate
from library.nn.running.recompute import cheap, run_again_in_backward
from library.nn.stand_in import device_kind, rms_norm

layer_norm_backward = torch.ops.aten.native_layer_norm_backward
_BLOCK_ELEMENTS = 1 << 18  # numbers that a CPU loop takes at a time: 1 MB in fp32, part of a level-2 cache


class RMSNorm(nn.Module):
    """Weight and epsilon of an RMS normalisation; `scaled_rms_norm` applies them."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def gain(self, factor_BD: Tensor | None = None) -> Tensor:
        """Return weight * factor in fp32, (B, D); (1, D) without a factor."""
        weight_D = self.weight
        if factor_BD is not None and factor_BD.dtype == wide(factor_BD):
            return weight_D * factor_BD  # the product is as wide as the wider of them: no cast of its own
        weight_D = cast(weight_D, wide(weight_D))
        return weight_D.unsqueeze(0) if factor_BD is None else weight_D * factor_BD

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{len(self.weight)}, eps={self.eps:g}"


def sinusoid(t_B: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Return cosines and then sines of a time at `width` / 2 frequencies, in fp32, (B, width)."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=t_B.device)
    angles = t_B.float()[:, None] * torch.exp(-math.log(max_period) * steps / half)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedder(nn.Module):
    """Sinusoid of a time in [0, 1] (unscaled, cosines first), then a two-layer perceptron.

    It runs in the dtype of its own weights, which the loader keeps in fp32: bf16 has 254 different times.
    """

    def __init__(self, dim: int, frequencies: int = 256, max_period: float = 10000.0) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.max_period = max_period
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t_B: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        features = sinusoid(t_B, self.frequencies, self.max_period)
        return self.mlp(features.to(next(self.parameters()).dtype))


# ---- x / rms(x) * gain, alone or added to the residual stream ----


def plain_scaled_rms_norm(x_TD: Tensor, gain_BD: Tensor, packing: Packing, eps: float) -> Tensor:
    """x / rms(x) * gain, each sample with its own row of the gain."""
    normed_TD = rms_norm(x_TD, eps)
    gain_BD = gain_BD.to(x_TD.dtype)
    if len(gain_BD) == 1:
        return normed_TD * gain_BD
    if torch.compiler.is_compiling():
        return normed_TD * spread(gain_BD, packing, len(x_TD))
    parts = [x * gain for gain, x in by_sample(packing.lengths, [gain_BD], [normed_TD])]
    return parts[0].flatten(0, 1) if len(parts) == 1 else torch.cat(parts)


def scaled_rms_norm(x_TD: Tensor, gain_BD: Tensor, packing: Packing, eps: float) -> Tensor:
    """Return x / rms(x) * gain.

    Args:
        gain_BD: one row a sample, or a single row for all.
        packing: which tokens are whose.
    """
    return cheap(fused("scaled_rms_norm", _scaled_rms_norm), x_TD, gain_BD, packing, eps)


def _scaled_rms_norm(x_TD: Tensor, gain_BD: Tensor, packing: Packing, eps: float) -> Tensor:
    if device_kind(x_TD) == "cpu" and not torch.compiler.is_compiling():
        return _ScaledRMSNorm.apply(x_TD, gain_BD, None, packing.lengths, eps)
    if _has_one_kernel(x_TD, gain_BD):
        return rms_norm(x_TD, eps, cast(gain_BD, x_TD.dtype).squeeze(0))
    plain = functools.partial(plain_scaled_rms_norm, packing=packing, eps=eps)
    return _run_again_for_gain(plain, x_TD, gain_BD)


def plain_normed_residual(
    stream_TD: Tensor, x_TD: Tensor, gain_BD: Tensor, packing: Packing, eps: float
) -> Tensor:
    """stream + x / rms(x) * gain."""
    return stream_TD + plain_scaled_rms_norm(x_TD, gain_BD, packing, eps)


def normed_residual(stream_TD: Tensor, x_TD: Tensor, gain_BD: Tensor, packing: Packing, eps: float) -> Tensor:
    """Return stream + x / rms(x) * gain, see `scaled_rms_norm`. A gate is a factor of the gain."""
    return cheap(fused("normed_residual", _normed_residual), stream_TD, x_TD, gain_BD, packing, eps)


def _normed_residual(
    stream_TD: Tensor, x_TD: Tensor, gain_BD: Tensor, packing: Packing, eps: float
) -> Tensor:
    if device_kind(x_TD) == "cpu" and not torch.compiler.is_compiling():
        return _ScaledRMSNorm.apply(x_TD, gain_BD, stream_TD, packing.lengths, eps)
    if _has_one_kernel(x_TD, gain_BD):
        return rms_norm(x_TD, eps, cast(gain_BD, x_TD.dtype).squeeze(0)).add_(stream_TD)
    plain = functools.partial(plain_normed_residual, packing=packing, eps=eps)
    return _run_again_for_gain(plain, stream_TD, x_TD, gain_BD)


def _has_one_kernel(x_TD: Tensor, gain_BD: Tensor) -> bool:
    """Whether torch has a kernel for it all: for GPUs, with one row for all. It keeps x, the row, 1 / rms."""
    return len(gain_BD) == 1 and device_kind(x_TD) == "cuda" and not torch.compiler.is_compiling()


class _ScaledRMSNorm(torch.autograd.Function):
    """x / rms(x) * gain (+ stream) on the CPU. Keeps x, the gain and one number a row."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_TD: Tensor,
        gain_BD: Tensor,
        stream_TD: Tensor | None,
        lengths: tuple[int, ...],
        eps: float,
    ) -> Tensor:
        tokens, dim = x_TD.shape
        lengths = (tokens,) if len(gain_BD) == 1 else lengths
        y_TD = torch.empty_like(x_TD)
        rstd_T1 = torch.empty(tokens, 1, dtype=wide(x_TD), device=x_TD.device)
        for rows, sample in row_blocks(lengths, dim):
            x = cast(x_TD[rows], rstd_T1.dtype)
            rstd = _reciprocal_rms(x, eps, rstd_T1[rows])
            with wide_room(y_TD[rows], x) as y:
                torch.mul(x, rstd, out=y).mul_(gain_BD[sample])
                if stream_TD is not None:
                    y.add_(stream_TD[rows])
        ctx.save_for_backward(x_TD, gain_BD, rstd_T1)
        ctx.lengths = lengths
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gain_BD, rstd_T1 = ctx.saved_tensors
        need_x, need_gain, need_stream, _, _ = ctx.needs_input_grad
        grad_x_TD = torch.empty_like(x_TD) if need_x else None
        grad_gain_BD = torch.zeros_like(gain_BD) if need_gain else None
        for rows, sample in row_blocks(ctx.lengths, x_TD.shape[-1]):
            rstd = rstd_T1[rows]
            x, grad = cast(x_TD[rows], rstd.dtype), cast(grad_TD[rows], rstd.dtype)
            if need_gain:
                grad_gain_BD[sample] += (x * rstd).mul_(grad).sum(0)
            if need_x:
                _through_rms(grad, gain_BD[sample], x, rstd, out=grad_x_TD[rows])
        return grad_x_TD, grad_gain_BD, grad_TD if need_stream else None, None, None


def _reciprocal_rms(x: Tensor, eps: float, out: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, written to `out`."""
    torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=out)
    return out.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _through_rms(grad: Tensor, gain_F: Tensor, x: Tensor, rstd: Tensor, *, out: Tensor) -> None:
    """Write the gradient of x, given that of x / rms(x) * gain: rstd * (g - x * mean(g x) * rstd^2), where g
    is grad * gain.

    Torch's backward of a layer norm is one pass over the rows. Told that their mean is zero it returns this
    less rstd * mean(g).
    """
    width, zero = x.shape[-1:], torch.zeros_like(rstd)
    inner, _, _ = layer_norm_backward(grad, x, width, zero, rstd, gain_F, None, [True, False, False])
    mean = torch.mv(grad.view(-1, *width), gain_F).view_as(rstd)
    torch.add(inner, mean.mul_(rstd), alpha=1 / x.shape[-1], out=out)


# ---- queries and keys: a norm a head, then the rotary embedding ----


def plain_norm_and_rotate(x_THF: Tensor, gain_HF: Tensor, table_TP2: Tensor | None, eps: float) -> Tensor:
    """rotate(x / rms(x) * gain), the norm over each head's own features."""
    normed_THF = F.rms_norm(x_THF.to(wide(x_THF)), x_THF.shape[-1:], eps=eps) * gain_HF
    turned_THF = normed_THF if table_TP2 is None else rotate(normed_THF, table_TP2)
    return turned_THF.to(x_THF.dtype)


def norm_and_rotate(x_THF: Tensor, gain_HF: Tensor, table_TP2: Tensor | None, eps: float) -> Tensor:
    """Return rotate(x / rms(x) * gain), contiguous, in the dtype of x.

    Args:
        x_THF: heads of queries and of keys, one after another.
        gain_HF: the norm's weight for each of these heads, fp32.
        table_TP2: cos and sin of each token and pair, see `library.nn.rope`; None: nothing is turned.
    """
    if torch.compiler.is_compiling():
        return plain_norm_and_rotate(x_THF, gain_HF, table_TP2, eps)
    function = _BY_HAND.get(device_kind(x_THF), plain_norm_and_rotate)
    return cheap(fused("norm_and_rotate", function), x_THF, gain_HF, table_TP2, eps)


def official_norm_and_rotate(x_THF: Tensor, gain_HF: Tensor, table_TP2: Tensor | None, eps: float) -> Tensor:
    """Return what `norm_and_rotate` does, rounded as by Kandinsky's official code.

    That rounds to the dtype of x after the norm, and after the rotation to bf16, whatever the dtype of x. It
    is there for comparison: it is slow and keeps every step for backward.
    """
    normed_THF = plain_norm_and_rotate(x_THF, gain_HF, None, eps)
    if table_TP2 is None:
        return normed_THF
    return rotate(normed_THF, table_TP2).to(torch.bfloat16).to(x_THF.dtype)


class _NormAndRotate(torch.autograd.Function):
    """rotate(x / rms(x) * gain) on the CPU. A pair is turned as one complex number, a single operation."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x_THF: Tensor, gain_HF: Tensor, table_TP2: Tensor | None, eps: float
    ) -> Tensor:
        tokens, heads, _ = x_THF.shape
        y_THF = torch.empty_like(x_THF, memory_format=torch.contiguous_format)
        rstd_TH1 = torch.empty(tokens, heads, 1, dtype=wide(x_THF), device=x_THF.device)
        turns_T1P = _turns(table_TP2, rstd_TH1.dtype)
        for rows in _blocks(x_THF):
            x = cast(x_THF[rows], rstd_TH1.dtype)
            rstd = _reciprocal_rms(x, eps, rstd_TH1[rows])
            with wide_room(y_THF[rows], x) as y:
                torch.mul(x, rstd, out=y).mul_(gain_HF)
                if turns_T1P is not None:
                    _pairs(y).mul_(turns_T1P[rows])
        ctx.save_for_backward(x_THF, gain_HF, table_TP2, rstd_TH1)
        return y_THF

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_THF: Tensor) -> tuple[Tensor | None, ...]:
        x_THF, gain_HF, table_TP2, rstd_TH1 = ctx.saved_tensors
        need_x, need_gain, _, _ = ctx.needs_input_grad
        grad_x_THF = torch.empty_like(x_THF, memory_format=torch.contiguous_format) if need_x else None
        grad_gain_HF = torch.zeros_like(gain_HF) if need_gain else None
        turns_T1P = _turns(table_TP2, rstd_TH1.dtype, back=True)
        one_F = torch.ones_like(gain_HF[0])
        for rows in _blocks(x_THF):
            rstd = rstd_TH1[rows]
            x, grad = cast(x_THF[rows], rstd.dtype), cast(grad_THF[rows], rstd.dtype)
            if turns_T1P is not None:
                grad = torch.view_as_real(_pairs(grad) * turns_T1P[rows]).flatten(-2)
            if need_gain:
                grad_gain_HF += (x * rstd).mul_(grad).sum(0)
            if need_x:
                _through_rms(grad * gain_HF, one_F, x, rstd, out=grad_x_THF[rows])
        return grad_x_THF, grad_gain_HF, None, None


class _NormAndRotateOnGPU(torch.autograd.Function):
    """The same in few kernels with little traffic: they widen what they read and round what they write, so
    that little is cast beforehand.

    It keeps x, the gain times sqrt(F), and the length h of each x, where h^2 is |x|^2 + F eps: x / rms(x) is
    sqrt(F) x / h.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x_THF: Tensor, gain_HF: Tensor, table_TP2: Tensor | None, eps: float
    ) -> Tensor:
        dtype, features = wide(x_THF), x_THF.shape[-1]
        gain_HF = gain_HF * math.sqrt(features)
        length_TH1 = torch.linalg.vector_norm(x_THF, dim=-1, keepdim=True, dtype=dtype)
        length_TH1.hypot_(_constant(math.sqrt(features * eps), dtype, x_THF.device))
        ctx.save_for_backward(x_THF, gain_HF, table_TP2, length_TH1)
        y_THF = torch.empty_like(x_THF, memory_format=torch.contiguous_format)
        if table_TP2 is None:
            return torch.mul(x_THF / length_TH1, gain_HF, out=y_THF)
        wide_THF = y_THF if y_THF.dtype == dtype else torch.empty_like(y_THF, dtype=dtype)
        torch.div(x_THF, length_TH1, out=wide_THF).mul_(gain_HF)
        _pairs(wide_THF).mul_(_turns(table_TP2, dtype))
        return y_THF if wide_THF is y_THF else y_THF.copy_(wide_THF)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_THF: Tensor) -> tuple[Tensor | None, ...]:
        x_THF, gain_HF, table_TP2, length_TH1 = ctx.saved_tensors
        need_x, need_gain, _, _ = ctx.needs_input_grad
        dtype = length_TH1.dtype
        if table_TP2 is not None:
            grad_THF = grad_THF.to(dtype, copy=True, memory_format=torch.contiguous_format)
            _pairs(grad_THF).mul_(_turns(table_TP2, dtype, back=True))
        grad_gain_HF = None
        if need_gain:
            normed_THF = (x_THF / length_TH1).mul_(math.sqrt(x_THF.shape[-1]))
            grad_gain_HF = normed_THF.mul_(grad_THF).sum(0)
        if not need_x:
            return None, grad_gain_HF, None, None
        # with g = grad gain sqrt(F): (g - x (g x) / h^2) / h
        inner_THF = grad_THF * gain_HF
        along_TH1 = (inner_THF * x_THF).sum(-1, keepdim=True).div_(length_TH1).div_(length_TH1)
        inner_THF.addcmul_(x_THF, along_TH1, value=-1)
        grad_x_THF = torch.empty_like(x_THF, memory_format=torch.contiguous_format)
        return torch.div(inner_THF, length_TH1, out=grad_x_THF), grad_gain_HF, None, None


@functools.cache  # a GPU would fill it each time, by a kernel of its own
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)


_BY_HAND = {"cpu": _NormAndRotate.apply, "cuda": _NormAndRotateOnGPU.apply}  # by kind of device


def _turns(table_TP2: Tensor | None, dtype: torch.dtype, *, back: bool = False) -> Tensor | None:
    """What complex pairs of all heads are multiplied by to turn them, or to turn them back."""
    if table_TP2 is None:
        return None
    turns_TP = torch.view_as_complex(cast(table_TP2, dtype))
    return (turns_TP.conj_physical() if back else turns_TP).unsqueeze(1)


def _pairs(x_THF: Tensor) -> Tensor:
    """View neighbouring features of a contiguous tensor as complex numbers."""
    return torch.view_as_complex(x_THF.unflatten(-1, (-1, 2)))


# ---- shared ----


def _run_again_for_gain(plain: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call a plain norm, which keeps a tensor of its own only if its gain (the last input) is trained."""
    if inputs[-1].requires_grad and not torch.compiler.is_compiling():
        return run_again_in_backward(plain, *inputs)
    return plain(*inputs)


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype in which norms are computed: fp32, or that of x where it is wider still."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@contextmanager
def wide_room(result: Tensor, x: Tensor) -> Iterator[Tensor]:
    """Lend room to compute `result` from `x`, in the dtype of x: the result's own memory; or, where x is a
    wider copy, which nobody needs after, the memory of x, which is rounded into the result."""
    room = result if result.dtype == x.dtype else x
    yield room
    if room is not result:
        result.copy_(room)


def row_blocks(lengths: tuple[int, ...], width: int) -> Iterator[tuple[slice, int]]:
    """Cut packed rows into blocks that end where samples end; yield the rows and the sample's index."""
    step, start = max(1, _BLOCK_ELEMENTS // width), 0
    for sample, length in enumerate(lengths):
        for offset in range(start, start + length, step):
            yield slice(offset, min(offset + step, start + length)), sample
        start += length


def _blocks(x: Tensor) -> Iterator[slice]:
    """Cut rows into blocks."""
    return (rows for rows, _ in row_blocks((len(x),), x[0].numel() if len(x) else 1))
