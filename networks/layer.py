"""The LoRA of one linear layer, and the layer that carries it.

    y = W x + b + multiplier * alpha / rank * up (down x)

Notable facts:
- One autograd operation a layer. The low-rank part is accumulated into the base layer's output in place, both
  ways, so no second full-width tensor is ever made; only x and the rank-wide `down x` are kept for backward.
- `low_rank` and plain `F.linear` are the reference implementation; tests hold the fast one against it.
- LoRA weights are fp32 and are cast to the activations' dtype inside the operation.
- The kinds of LoRA differ in how they make the two factors that the operation multiplies (`LoRA.factors`);
  each is saved as a plain LoRA of the same effect.

Shape legend: N rows (tokens, or samples), I in features, O out features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from library.core.seeds import generator
from library.nn.products import Linear, layer_dtype


class _LoRALinearOp(torch.autograd.Function):
    """`F.linear(x, weight, bias) + low_rank(x, down, up, factor)`, multiplied in `dtype`.

    The base layer is constant: weight and bias get no gradient.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_NI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        down: Tensor,
        up: Tensor,
        factor: float | Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        down_RI, up_OR, wide_NI = down.to(dtype), up.to(dtype), x_NI.to(dtype)
        h_NR = torch.mm(wide_NI, down_RI.t()).mul_(factor)
        y_NO = F.linear(wide_NI, weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))
        y_NO.addmm_(h_NR, up_OR.t())
        ctx.save_for_backward(x_NI, weight_OI, down_RI, up_OR, h_NR)
        ctx.factor, ctx.dtype, ctx.lora_dtype = factor, dtype, down.dtype
        return y_NO.to(x_NI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, down_RI, up_OR, h_NR = ctx.saved_tensors
        need_x, _, _, need_down, need_up, _, _ = ctx.needs_input_grad
        grad_x = grad_down = grad_up = None
        grad_NO = grad_NO.to(ctx.dtype)
        grad_h_NR = torch.mm(grad_NO, up_OR).mul_(ctx.factor)
        if need_down:
            grad_down = torch.mm(grad_h_NR.t(), x_NI.to(ctx.dtype)).to(ctx.lora_dtype)
        if need_up:  # this order of factors is the faster one: the wide matrix is not transposed
            grad_up = torch.mm(h_NR.t(), grad_NO).t().to(ctx.lora_dtype)
        if need_x:
            grad_x = torch.mm(grad_NO, weight_OI.to(ctx.dtype)).addmm_(grad_h_NR, down_RI).to(x_NI.dtype)
        return grad_x, None, None, grad_down, grad_up, None, None


def low_rank(x_NI: Tensor, down: Tensor, up: Tensor, factor: float | Tensor) -> Tensor:
    """Return what a LoRA adds to a linear layer's output (N, O), in plain operations.

    Args:
        down: (R, I). up: (O, R). Both are cast to the dtype of x.
        factor: multiplied into `down x`: a number, or (N, R), or (1, R).
    """
    return F.linear(F.linear(x_NI, down.to(x_NI.dtype)) * factor, up.to(x_NI.dtype))


@dataclass(frozen=True)
class Dropouts:
    """What training leaves out at random, as probabilities.

    neuron: single entries of `down x`. rank: whole ranks. module: the whole LoRA, for one call.
    """

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0


class LoRA(nn.Module):
    """The trainable half of one linear layer: `down` (rank, in) and `up` (out, rank), both fp32."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float | None) -> None:
        super().__init__()
        self.rank = rank
        self.alpha = float(alpha or rank)  # None and 0 mean "as the rank", that is a scale of one
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.empty(out_features, rank))
        self.dropouts = Dropouts()
        self.set_strength(1.0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the matrices (R, I) and (O, R) that are multiplied in a call."""
        return self.down, self.up

    @torch.no_grad()
    def to_file(self) -> tuple[Tensor, Tensor, float]:
        """Return down, up and alpha of the plain LoRA that has this one's effect."""
        return *self.factors(), self.alpha

    @torch.no_grad()
    def from_file(self, down: Tensor, up: Tensor) -> None:
        """Take over a plain LoRA of the shapes that `to_file` returns, and that `can_hold` says yes to."""
        self.down.copy_(down)
        self.up.copy_(up)

    def can_hold(self, up: Tensor) -> bool:
        """Whether a plain LoRA's `up` (out, rank in file) can be expressed by this kind."""
        return True

    def set_strength(self, multiplier: float) -> None:
        """Set `scale`, the factor of `up down x`, to multiplier * alpha / rank; 0 switches the LoRA off."""
        self.scale = multiplier * self.alpha / self.rank

    @torch.no_grad()
    def reset(self, seed: int, name: str) -> None:
        """Start weights: `down` uniform in +-1/sqrt(in), `up` zero. A function of (seed, name) alone."""
        draws = torch.empty(self.down.shape)
        nn.init.kaiming_uniform_(draws, a=math.sqrt(5), generator=generator(seed, "lora", name))
        self.down.copy_(draws)
        self.up.zero_()

    def skips_call(self) -> bool:
        """Whether this call leaves the LoRA out: its scale is zero, or module dropout drew it."""
        if self.scale == 0.0:
            return True
        p = self.dropouts.module
        return p > 0 and self.training and bool(torch.rand(()) < p)

    def draw_factor(self, x: Tensor) -> float | Tensor:
        """Return what multiplies `down x` in this call: `scale`, where dropped 0, else / kept share.

        Rank dropout draws once for each sample of a (B, L, D) input, and once for all rows of a (L, D) one,
        whose rows may be the packed tokens of several samples.
        """
        neuron, rank = self.dropouts.neuron, self.dropouts.rank
        if not self.training or (neuron == 0 and rank == 0):
            return self.scale
        rows = math.prod(x.shape[:-1])
        factor = torch.full((1, len(self.down)), self.scale, dtype=x.dtype, device=x.device)
        if rank > 0:
            samples = x.shape[0] if x.dim() > 2 else 1
            drawn = F.dropout(factor.expand(samples, -1), rank)
            factor = drawn.repeat_interleave(rows // samples, dim=0) if samples > 1 else drawn
        if neuron > 0:
            factor = F.dropout(factor.expand(rows, -1), neuron)
        return factor

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return what merging adds to the base weight, (out, in) in fp32."""
        down, up = self.factors()
        return self.scale * (up.float() @ down.float())

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return the Frobenius norm of alpha / rank * up down, which is `delta` at multiplier 1; 0-dim, fp32.

        |U D|^2 is the sum over the entries of U'U times D D', so the wide product is never made.
        """
        down, up = (factor.float() for factor in self.factors())
        return self.alpha / self.rank * ((up.t() @ up) * (down @ down.t())).sum().clamp_min(0).sqrt()

    @torch.no_grad()
    def shrink(self, ratio: Tensor) -> None:
        """Multiply `delta` by `ratio`, shared out equally between both matrices."""
        self.down.mul_(ratio.sqrt())
        self.up.mul_(ratio.sqrt())

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        shape = f"{self.down.shape[1]} -> {self.up.shape[0]}"
        return f"{shape}, rank={self.rank}, alpha={self.alpha:g}, scale={self.scale:g}"


class SplitLoRA(LoRA):
    """A LoRA of its own for each part of a fused layer's output, such as q, k and v.

    `down` (parts * rank, in) and `up` (out, rank) hold the parts' matrices one below the other. A plain LoRA
    of the same effect has the rank parts * rank and a block-diagonal `up`; its alpha is as many times larger,
    so that a reader who divides by the rank gets the trained strength.
    """

    def __init__(self, in_features: int, widths: Sequence[int], rank: int, alpha: float | None) -> None:
        super().__init__(in_features, sum(widths), rank, alpha)
        self.widths = tuple(widths)
        self.down = nn.Parameter(torch.empty(len(self.widths) * rank, in_features))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the stacked `down` and the block-diagonal `up`."""
        return self.down, torch.block_diag(*self.up.split(self.widths))

    @torch.no_grad()
    def to_file(self) -> tuple[Tensor, Tensor, float]:
        """Return the fused LoRA."""
        return *self.factors(), self.alpha * len(self.widths)

    @torch.no_grad()
    def from_file(self, down: Tensor, up: Tensor) -> None:
        """Take over a fused LoRA."""
        self.down.copy_(down)
        self.up.copy_(torch.cat(self._blocks(up)))

    def can_hold(self, up: Tensor) -> bool:
        """Whether `up` is block-diagonal."""
        return torch.equal(torch.block_diag(*self._blocks(up)), up)

    def _blocks(self, up: Tensor) -> list[Tensor]:
        """Return the diagonal blocks of an (out, parts * rank) matrix."""
        parts = zip(up.split(self.widths), range(0, up.shape[1], self.rank), strict=True)
        return [rows[:, first : first + self.rank] for rows, first in parts]

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        return f"{super().extra_repr()}, parts={list(self.widths)}"


class LoRALinear(nn.Module):
    """A linear layer with one or more LoRAs on it; stands in the model where the layer stood."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.loras: tuple[LoRA, ...] = ()  # a tuple, so that they do not become the model's own parameters

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x and of the base weight."""
        drawn = [(lora, lora.draw_factor(x)) for lora in self.loras if not lora.skips_call()]
        if not drawn:
            return self.base(x)
        x_NI = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        base, ((lora, factor), *more) = self.base, drawn
        dtype = layer_dtype(x) if isinstance(base, Linear) else x.dtype  # as the base layer itself multiplies
        y_NO = _LoRALinearOp.apply(x_NI, base.weight, base.bias, *lora.factors(), factor, dtype)
        for lora, factor in more:
            y_NO = y_NO + low_rank(x_NI, *lora.factors(), factor)
        return y_NO if x.dim() == 2 else y_NO.view(*x.shape[:-1], -1)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every linear layer of `model` by path; one that carries a LoRA is found under its own path."""
    found: dict[str, nn.Linear] = {}
    carriers: set[nn.Module] = set()
    for path, module in model.named_modules():  # parents come before their children
        if isinstance(module, LoRALinear):
            found[path] = module.base
            carriers.add(module.base)
        elif isinstance(module, nn.Linear) and module not in carriers:
            found[path] = module
    return found
