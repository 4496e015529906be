"""The memory-bound parts of a transformer block: normalisation with modulation, gated residual, SwiGLU, q/k preparation.

Each `plain_*` function is the reference: it says what is computed, and it is what `torch.compile` gets to see. The
function of the same name without `plain_` computes the same and keeps less for backward: its inputs, and whatever is
one number a row. On the CPU that is written out by hand, in fp32 inside and rounded once, some rows at a time so that
temporaries stay in the cache; elsewhere the plain function runs again in backward where that saves memory.

Norm weights enter as a `gain` that callers make with ordinary operations, so they get gradients when they want them.

Shape legend: T packed tokens of all samples, B samples, D features, F hidden features of the feed-forward, H heads of
queries followed by heads of keys, P pairs of features of a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from library.nn.rope import rotate

_BLOCK_ELEMENTS = 1 << 18  # numbers that a CPU loop takes at a time: 1 MB in fp32, which fits a second-level cache


class RMSNorm(nn.Module):
    """Weight and epsilon of an RMS normalisation."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def gain(self, factor_BD: Tensor | None = None) -> Tensor:
        """Return weight * factor in fp32, (B, D), for `scaled_rms_norm`; (1, D) without a factor."""
        weight_D = self.weight.float()
        return weight_D.unsqueeze(0) if factor_BD is None else weight_D * factor_BD.float()


class TimestepEmbedder(nn.Module):
    """Sinusoid of a time in [0, 1] (not scaled; cosines first), then a two-layer perceptron.

    It runs in the dtype of its own weights, which the loader keeps in fp32: in bf16 two thirds of all times in a
    thousand would coincide.
    """

    def __init__(self, dim: int, frequency_dim: int = 256, max_period: float = 10000.0) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.max_period = max_period
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t_B: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        half = self.frequency_dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t_B.device) / half
        angles = t_B.float()[:, None] * torch.exp(-math.log(self.max_period) * exponents)
        features = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return self.mlp(features.to(next(self.parameters()).dtype))


# ---- x / rms(x) * gain, alone or added to the residual stream -------------------------------------------------------


def plain_scaled_rms_norm(x_TD: Tensor, gain_BD: Tensor, lengths: Sequence[int], eps: float) -> Tensor:
    """x / rms(x) * gain, each sample with its own row of the gain."""
    normed_TD = F.rms_norm(x_TD, x_TD.shape[-1:], eps=eps)
    gain_BD = gain_BD.to(x_TD.dtype)
    if len(gain_BD) == 1:
        return normed_TD * gain_BD
    return torch.cat([part * gain for part, gain in zip(normed_TD.split(list(lengths)), gain_BD, strict=True)])


def plain_normed_residual(
    stream_TD: Tensor, x_TD: Tensor, gain_BD: Tensor, lengths: Sequence[int], eps: float
) -> Tensor:
    """stream + x / rms(x) * gain."""
    return stream_TD + plain_scaled_rms_norm(x_TD, gain_BD, lengths, eps)


def scaled_rms_norm(x_TD: Tensor, gain_BD: Tensor, lengths: Sequence[int], eps: float) -> Tensor:
    """Return x / rms(x) * gain.

    Args:
        gain_BD: one row a sample, or a single row for all.
        lengths: tokens of each sample, in order.
    """
    if _by_hand(x_TD):
        return _ScaledRMSNorm.apply(x_TD, gain_BD, None, tuple(lengths), eps)
    plain = functools.partial(plain_scaled_rms_norm, lengths=lengths, eps=eps)
    return run_again_in_backward(plain, x_TD, gain_BD) if gain_BD.requires_grad else plain(x_TD, gain_BD)


def normed_residual(
    stream_TD: Tensor, x_TD: Tensor, gain_BD: Tensor, lengths: Sequence[int], eps: float
) -> Tensor:
    """Return stream + x / rms(x) * gain, as `scaled_rms_norm`. A gate is a factor of the gain."""
    if _by_hand(x_TD):
        return _ScaledRMSNorm.apply(x_TD, gain_BD, stream_TD, tuple(lengths), eps)
    plain = functools.partial(plain_normed_residual, lengths=lengths, eps=eps)
    inputs = (stream_TD, x_TD, gain_BD)
    return run_again_in_backward(plain, *inputs) if gain_BD.requires_grad else plain(*inputs)


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
        rstd_T1 = torch.empty(tokens, 1, dtype=wide(x_TD))
        for rows, sample in _row_blocks(lengths, dim):
            x = x_TD[rows].to(rstd_T1.dtype)
            rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=rstd_T1[rows])
            rstd.square_().div_(dim).add_(eps).rsqrt_()
            y = (x * rstd).mul_(gain_BD[sample])
            y_TD[rows] = y if stream_TD is None else y.add_(stream_TD[rows])
        ctx.save_for_backward(x_TD, gain_BD, rstd_T1)
        ctx.lengths = lengths
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gain_BD, rstd_T1 = ctx.saved_tensors
        need_x, need_gain, need_stream, _, _ = ctx.needs_input_grad
        dim = x_TD.shape[-1]
        grad_x_TD = torch.empty_like(x_TD) if need_x else None
        grad_gain_BD = torch.zeros_like(gain_BD) if need_gain else None
        for rows, sample in _row_blocks(ctx.lengths, dim):
            rstd = rstd_T1[rows]
            x, grad = x_TD[rows].to(rstd.dtype), grad_TD[rows].to(rstd.dtype)
            if need_gain:
                grad_gain_BD[sample] += (x * rstd).mul_(grad).sum(0)
            if need_x:
                inner = grad * gain_BD[sample]
                along = torch.linalg.vecdot(inner, x).unsqueeze(-1).mul_(rstd.pow(3)).div_(dim)
                grad_x_TD[rows] = inner.mul_(rstd).addcmul_(x, along, value=-1)
        return grad_x_TD, grad_gain_BD, grad_TD if need_stream else None, None, None


# ---- SwiGLU --------------------------------------------------------------------------------------------------------


def plain_swiglu(a_TF: Tensor, b_TF: Tensor) -> Tensor:
    """silu(a) * b."""
    return F.silu(a_TF) * b_TF


def swiglu(a_TF: Tensor, b_TF: Tensor) -> Tensor:
    """Return silu(a) * b; silu(a) is not kept for backward."""
    if torch.compiler.is_compiling():
        return plain_swiglu(a_TF, b_TF)
    return _SwiGLU.apply(a_TF, b_TF)


class _SwiGLU(torch.autograd.Function):
    """silu(a) * b. Keeps a and b, which the linear layers made anyway, and nothing else."""

    @staticmethod
    def forward(ctx: FunctionCtx, a_TF: Tensor, b_TF: Tensor) -> Tensor:
        ctx.save_for_backward(a_TF, b_TF)
        y_TF = torch.empty_like(a_TF)
        for rows in _blocks_of(a_TF):
            torch.mul(F.silu(a_TF[rows]), b_TF[rows], out=y_TF[rows])
        return y_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_TF: Tensor) -> tuple[Tensor | None, ...]:
        a_TF, b_TF = ctx.saved_tensors
        grad_a_TF, grad_b_TF = torch.empty_like(a_TF), torch.empty_like(b_TF)
        for rows in _blocks_of(a_TF):
            a, grad = a_TF[rows], grad_TF[rows]
            torch.mul(F.silu(a), grad, out=grad_b_TF[rows])
            grad_a_TF[rows] = torch.ops.aten.silu_backward(grad * b_TF[rows], a)
        return grad_a_TF, grad_b_TF


# ---- queries and keys: a norm a head, then the rotary embedding -----------------------------------------------------


def plain_norm_and_rotate(x_THD: Tensor, gain_HD: Tensor, table_TP2: Tensor, eps: float) -> Tensor:
    """rotate(x / rms(x) * gain), the norm over each head's own features."""
    normed_THD = F.rms_norm(x_THD.to(wide(x_THD)), x_THD.shape[-1:], eps=eps) * gain_HD
    return rotate(normed_THD, table_TP2).to(x_THD.dtype)


def norm_and_rotate(x_THD: Tensor, gain_HD: Tensor, table_TP2: Tensor, eps: float) -> Tensor:
    """Return rotate(x / rms(x) * gain), contiguous, in the dtype of x.

    Args:
        gain_HD: the norm's weight for each head (queries and keys differ), fp32.
        table_TP2: cos and sin of each token and pair, see `library.nn.rope`.
    """
    if _by_hand(x_THD):
        return _NormAndRotate.apply(x_THD, gain_HD, table_TP2, eps)
    plain = functools.partial(plain_norm_and_rotate, table_TP2=table_TP2, eps=eps)
    return plain(x_THD, gain_HD) if torch.compiler.is_compiling() else run_again_in_backward(plain, x_THD, gain_HD)


class _NormAndRotate(torch.autograd.Function):
    """rotate(x / rms(x) * gain) on the CPU, where turning a pair is fastest as a product of complex numbers."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_THD: Tensor, gain_HD: Tensor, table_TP2: Tensor, eps: float) -> Tensor:
        tokens, heads, dim = x_THD.shape
        y_THD = x_THD.new_empty(x_THD.shape)
        rstd_TH1 = torch.empty(tokens, heads, 1, dtype=wide(x_THD))
        turns_TP = torch.view_as_complex(table_TP2.to(rstd_TH1.dtype)).unsqueeze(1)
        for rows, _ in _row_blocks((tokens,), heads * dim):
            x = x_THD[rows].to(rstd_TH1.dtype)
            rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=rstd_TH1[rows])
            rstd.square_().div_(dim).add_(eps).rsqrt_()
            y = torch.mul(x, rstd, out=x.new_empty(x.shape)).mul_(gain_HD)
            _pairs(y).mul_(turns_TP[rows])
            y_THD[rows] = y
        ctx.save_for_backward(x_THD, gain_HD, table_TP2, rstd_TH1)
        return y_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        x_THD, gain_HD, table_TP2, rstd_TH1 = ctx.saved_tensors
        need_x, need_gain, _, _ = ctx.needs_input_grad
        tokens, heads, dim = x_THD.shape
        grad_x_THD = x_THD.new_empty(x_THD.shape) if need_x else None
        grad_gain_HD = torch.zeros_like(gain_HD) if need_gain else None
        turns_TP = torch.view_as_complex(table_TP2.to(rstd_TH1.dtype)).conj().resolve_conj().unsqueeze(1)
        for rows, _ in _row_blocks((tokens,), heads * dim):
            rstd = rstd_TH1[rows]
            x, grad = x_THD[rows].to(rstd.dtype), grad_THD[rows].to(rstd.dtype, copy=True)
            _pairs(grad).mul_(turns_TP[rows])
            if need_gain:
                grad_gain_HD += (x * rstd).mul_(grad).sum(0)
            if need_x:
                inner = grad.mul_(gain_HD)
                along = torch.linalg.vecdot(inner, x).unsqueeze(-1).mul_(rstd.pow(3)).div_(dim)
                grad_x_THD[rows] = inner.mul_(rstd).addcmul_(x, along, value=-1)
        return grad_x_THD, grad_gain_HD, None, None


def _pairs(x_THD: Tensor) -> Tensor:
    """View neighbouring features of a contiguous fp32 tensor as complex numbers."""
    return torch.view_as_complex(x_THD.unflatten(-1, (-1, 2)))


# ---- shared --------------------------------------------------------------------------------------------------------


def run_again_in_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return function(*inputs), keeping only the inputs for backward and calling `function` again there.

    Like checkpointing, but for a few deterministic operations: no random state is saved and no hooks are set.
    """
    return _RunAgain.apply(function, *inputs)


class _RunAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed, strict=True)]
            output = ctx.function(*inputs)
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        grads = iter(torch.autograd.grad(output, wanted, grad))
        return None, *(next(grads) if need else None for need in needed)


def wide(x: Tensor) -> torch.dtype:
    """The dtype in which norms are computed: fp32, or that of x where it is wider still."""
    return torch.promote_types(x.dtype, torch.float32)


def _by_hand(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _row_blocks(lengths: Sequence[int], width: int) -> Iterator[tuple[slice, int]]:
    """Cut packed rows into blocks that end where samples end; yields the rows and the sample's index."""
    step, start = max(1, _BLOCK_ELEMENTS // width), 0
    for sample, length in enumerate(lengths):
        for offset in range(start, start + length, step):
            yield slice(offset, min(offset + step, start + length)), sample
        start += length


def _blocks_of(x_TF: Tensor) -> Iterator[slice]:
    """Blocks of rows on the CPU, all rows at once elsewhere, where each operation is a kernel launch."""
    tokens, width = x_TF.shape
    if x_TF.device.type != "cpu":
        yield slice(None)
    else:
        yield from (rows for rows, _ in _row_blocks((tokens,), width))
