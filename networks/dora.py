"""DoRA: a LoRA turns the columns of a weight matrix, and a trained number each says how long they are.

    W' = m * V / |V|      V = W + alpha / rank * up down

|V| is the norm of each column of V (input feature), or of each row (output feature, `on_output`); m starts as
that of W, so a new DoRA has no effect (arXiv 2402.09353). At a multiplier other than 1 it is W + multiplier *
(W' - W).

Notable facts:
- |V| is taken for constant in backward, as the paper's section 4.3 does, peft and others with it.
- |V| comes from |W|, kept from the start, and thin products: |V|^2 = |W|^2 + 2 W.(up down) + |up down|^2. No
  matrix as large as W is made.
- One autograd operation a layer, like a plain LoRA: the factor m / |V| goes into the rows of x, or of y, and
  into one of the thin matrices.
- The factor is fp32 whatever the activations are, because its changes are below what bf16 can tell from 1.

Shape legend: N rows (tokens, or samples), I in features, O out features, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from library.nn.products import product_dtype
from library.nn.running.compiling import unshared
from library.nn.weights.quant import restore
from networks.lora_op import Constants

_EPSILON = torch.finfo(torch.float32).eps  # added to norms by LyCORIS and ComfyUI


class Magnitude(nn.Module):
    """The trained lengths of a weight's columns, or rows, and what their factors are computed from."""

    def __init__(self, weight_OI: Tensor, *, on_output: bool, device: torch.device | None = None) -> None:
        super().__init__()
        self.on_output = on_output
        wide = torch.promote_types(weight_OI.dtype, torch.float32)
        norms = torch.linalg.vector_norm(weight_OI, dim=1 if on_output else 0, dtype=wide).float()
        self.register_buffer("base_squares", norms.square().to(device or weight_OI.device), persistent=False)
        self.dora_scale = nn.Parameter(self._length(self.base_squares))

    def factor(self, weight_OI: Tensor, down_RI: Tensor, up_OR: Tensor, strength: float) -> Tensor:
        """Return m / |V|, (O,) if on_output, else (I,); its gradient goes to m alone."""
        exact, dtype = self.base_squares.dtype, product_dtype(weight_OI)
        with torch.no_grad():
            near_NR, far_MR, weight_NM = down_RI.t().to(exact), up_OR.to(exact), weight_OI.t()
            if self.on_output:
                near_NR, far_MR, weight_NM = far_MR, near_NR, weight_OI
            crossed_NR = (weight_NM.to(dtype) @ far_MR.to(dtype)).to(exact)
            across_N = (crossed_NR * near_NR).sum(1)
            own_N = ((near_NR @ (far_MR.t() @ far_MR)) * near_NR).sum(1)
            squares_N = self.base_squares + 2 * strength * across_N + strength**2 * own_N
            length_N = self._length(squares_N)
        return self.dora_scale / length_N

    @torch.no_grad()
    def decompose(self, changed_OI: Tensor) -> Tensor:
        """Return m V / |V| for V = `changed_OI`, which is overwritten."""
        dim = 1 if self.on_output else 0
        length = torch.linalg.vector_norm(changed_OI, dim=dim, keepdim=True) + _EPSILON
        return changed_OI.mul_(self.dora_scale.to(changed_OI).unsqueeze(dim) / length)

    def to_file(self) -> Tensor:
        """Return m as files have it: (O, 1) or (1, I)."""
        return self.dora_scale.detach().unsqueeze(1 if self.on_output else 0)

    @torch.no_grad()
    def from_file(self, dora_scale: Tensor) -> None:
        """Take m over from a file."""
        self.dora_scale.copy_(dora_scale.flatten())

    @staticmethod
    def _length(squares: Tensor) -> Tensor:
        return squares.clamp_min(0).sqrt() + _EPSILON


class DoRALinearOp(torch.autograd.Function):
    """`scaled_linear(x, weight, bias, scale) + low_rank(x, down, up, factor)`, multiplied in `dtype`.

    The base layer is constant: weight and bias get no gradient. Its weight comes in stored form, and is
    restored again in backward.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_NI: Tensor,
        down: Tensor,
        up: Tensor,
        scale: Tensor,
        constants: Constants,
        on_output: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        bias_O, factor, way, stored = constants
        down_RI, up_OR, wide_NI = down.to(dtype), up.to(dtype), x_NI.to(dtype)
        h_NR = torch.mm(wide_NI, down_RI.t()).mul_(factor)
        bias, plain_NO = None if bias_O is None else bias_O.to(dtype), None
        weight_OI = restore(way, stored, dtype)
        if on_output:  # as a change of the base layer's output, so that a scale of 1 changes no bit
            y_NO = F.linear(wide_NI, weight_OI, bias)
            plain_NO = y_NO if bias is None else y_NO - bias
            y_NO = (y_NO + plain_NO * (scale - 1)).to(dtype)
        else:
            y_NO = F.linear((wide_NI * scale).to(dtype), weight_OI, bias)
        y_NO.addmm_(h_NR, up_OR.t())
        ctx.save_for_backward(x_NI, down_RI, up_OR, h_NR, scale, plain_NO, *stored)
        ctx.way = way
        ctx.factor, ctx.dtype, ctx.x_dtype, ctx.lora_dtype = factor, dtype, x_NI.dtype, down.dtype
        return unshared(y_NO.to(x_NI.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, down_RI, up_OR, h_NR, scale, plain_NO, *stored = ctx.saved_tensors
        need_x, need_down, need_up, need_scale = ctx.needs_input_grad[:4]
        grad_x = grad_down = grad_up = grad_scale = None
        dtype, weight_OI = ctx.dtype, restore(ctx.way, stored, ctx.dtype, after=grad_NO)
        grad_NO, x_NI = grad_NO.to(dtype), x_NI.to(dtype)
        grad_h_NR = torch.mm(grad_NO, up_OR).mul_(ctx.factor)
        if need_down:
            grad_down = torch.mm(grad_h_NR.t(), x_NI).to(ctx.lora_dtype)
        if need_up:
            grad_up = torch.mm(h_NR.t(), grad_NO).t().to(ctx.lora_dtype)
        if plain_NO is not None:
            if need_scale:
                grad_scale = (grad_NO.to(scale.dtype) * plain_NO).sum(0)
            if need_x:
                grad_x = torch.mm((grad_NO * scale).to(dtype), weight_OI)
        elif need_x or need_scale:
            grad_scaled_NI = torch.mm(grad_NO, weight_OI)
            grad_scale = (grad_scaled_NI.to(scale.dtype) * x_NI).sum(0) if need_scale else None
            grad_x = (grad_scaled_NI * scale).to(dtype) if need_x else None
        if grad_x is not None:
            grad_x = grad_x.addmm_(grad_h_NR, down_RI).to(ctx.x_dtype)
        return grad_x, grad_down, grad_up, grad_scale, None, None, None


def scaled_linear(
    x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, scale: Tensor, on_output: bool
) -> Tensor:
    """Return the output (N, O) of a layer whose weight's rows or columns are times `scale`, plainly."""
    if on_output:
        y_NO = (F.linear(x_NI, weight_OI) * scale).to(x_NI.dtype)
        return y_NO if bias_O is None else y_NO + bias_O
    return F.linear((x_NI * scale).to(x_NI.dtype), weight_OI, bias_O)
