"""What LyCORIS trains of one linear layer, as a member of `LoRALinear.loras`: the tensors, and what they do.

    y = W x + b + dropout(change x)

The change of the weight is made for each call and again in backward, so that only x is kept, or, for lokr,
never made: its two matrices are applied one after the other. Tensors are fp32; the change is computed in fp32
and multiplied in the dtype of the base layer.

Shape legend: N rows (tokens, or samples), I in features, O out features; a lokr has O = A B and I = C D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from library.core.seeds import generator
from networks.layer import Dropouts
from networks.lycoris.files import ending
from networks.lycoris.kinds import KINDS, LokrKind, LoRAKind, Settings, lengths, uniform_bound
from networks.names import ALPHA, ON_INPUT


@dataclass(frozen=True)
class LycorisSize:
    """What one layer gets: a kind of `KINDS`, and the shapes of its tensors by their names there.

    A trained `scalar` is among them where it is asked for: it is (), begins at zero, and files have it
    multiplied in. `rescale_dropout`: rank dropout keeps the average by making what stays larger.
    """

    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    settings: Settings = Settings()
    rescale_dropout: bool = False
    lr: None = None  # as in `LoRASize`: there are no rates of single layers here

    def make(self, path: str, layer: nn.Linear, device: torch.device) -> Lycoris:
        """Make it for the layer at `path` on `device`; its start weights are not set yet."""
        return Lycoris(self, device)


class Lycoris(nn.Module):
    """The trainable half of one linear layer."""

    def __init__(self, size: LycorisSize, device: torch.device | None = None) -> None:
        super().__init__()
        self.size, self.kind, self.settings = size, KINDS[size.kind], size.settings
        shapes = size.shapes.items()
        self.tensors = nn.ParameterDict({name: torch.empty(shape, device=device) for name, shape in shapes})
        self.dropouts = Dropouts()
        self.scale = 1.0

    @property
    def rank(self) -> int:
        """The rank, or 0 for a kind that has none."""
        return self.kind.rank(self.tensors) or 0

    @property
    def alpha(self) -> float:
        """What the file says of the strength, or 0."""
        return self.settings.alpha or 0.0

    def set_strength(self, multiplier: float) -> None:
        """Set how strongly the change acts: 1 as trained, 0 not at all."""
        self.scale = multiplier

    @torch.no_grad()
    def reset(self, seed: int, name: str, layer: nn.Linear) -> None:
        """Start weights, without effect: a function of (seed, name) and, of `dora_scale`, the base weight."""
        random = dict(self.kind.starts)
        if "scalar" in self.tensors:
            random |= self.kind.closed
        for key, tensor in self.tensors.items():
            if key in random:
                draws = torch.empty(tensor.shape)
                source = generator(seed, "lycoris", name, key)
                if random[key] is None:
                    bound = uniform_bound(draws.shape)
                    draws.uniform_(-bound, bound, generator=source)
                else:
                    draws.normal_(0.0, random[key], generator=source)
                tensor.copy_(draws)
            elif key == "dora_scale":
                tensor.copy_(lengths(layer.weight, tensor))
            else:
                tensor.fill_(1.0 if key == "rescale" else 0.0)

    def skips_call(self) -> bool:
        """Whether this call leaves the change out: its strength is zero, or module dropout drew it."""
        return self.scale == 0.0 or (self.training and self.dropouts.leave_out())

    def forward(self, x_NI: Tensor, layer: nn.Linear, dtype: torch.dtype) -> Tensor:
        """Return what is added to the output of the base layer, (N, O), in the dtype of x."""
        if "dora_scale" not in self.tensors and isinstance(self.kind, LoRAKind):
            down_RI, up_OR = self.tensors["lora_down"], self._with_scalar("lora_up")
            factor = self.scale * self.kind.scale(self.tensors, self.settings)
            y_NO = F.linear(F.linear(x_NI.to(dtype), down_RI.to(dtype)) * factor, up_OR.to(dtype))
        elif "dora_scale" not in self.tensors and isinstance(self.kind, LokrKind):
            w1_AC, w2_BD = self.kind.both(self.tensors, self.settings)
            y_NO = _KronOp.apply(x_NI, self.scale * w1_AC, w2_BD, dtype)
        else:
            y_NO = self._changed(x_NI, layer, dtype)
        if "diff_b" in self.tensors:
            y_NO = y_NO + (self.scale * self.tensors["diff_b"]).to(dtype)
        return self._drop(y_NO).to(x_NI.dtype)

    def _changed(self, x_NI: Tensor, layer: nn.Linear, dtype: torch.dtype) -> Tensor:
        names = tuple(name for name in self.tensors if name != "diff_b")
        strength = self.scale  # as it is now, in backward too

        def change(weight_OI: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
            named = dict(zip(names, tensors, strict=True))
            wide_OI = None if weight_OI is None else weight_OI.float()
            return self.kind.change(named, wide_OI, self.settings, strength)

        needed = None if self._ignores_weight() else layer.weight
        tensors = [self.tensors[name] for name in names]
        if torch.compiler.is_compiling():  # the compiler decides by itself what to keep
            return F.linear(x_NI.to(dtype), change(needed, tensors).to(dtype))
        return _ChangeOp.apply(x_NI, needed, change, dtype, *tensors)

    def _ignores_weight(self) -> bool:
        return self.kind.linear and "dora_scale" not in self.tensors

    def _with_scalar(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return tensor * self.tensors["scalar"] if "scalar" in self.tensors else tensor

    def _drop(self, y_NO: Tensor) -> Tensor:
        """Leave out output features (rank dropout) and single numbers (neuron dropout) of what is added; and
        all of it, in compiled code (module dropout)."""
        if not self.training:
            return y_NO
        present = self.dropouts.drawn_presence(y_NO)
        y_NO = y_NO if present is None else y_NO * present
        if self.dropouts.rank > 0:
            kept_O = (torch.rand(y_NO.shape[-1], device=y_NO.device) >= self.dropouts.rank).to(y_NO.dtype)
            if self.size.rescale_dropout:
                kept_O = kept_O / kept_O.float().mean().clamp_min(1 / len(kept_O)).to(y_NO.dtype)
            y_NO = y_NO * kept_O
        return F.dropout(y_NO, self.dropouts.neuron)

    @torch.no_grad()
    def delta(self, weight_OI: Tensor) -> Tensor:
        """Return what merging adds to the base weight, (O, I) in fp32, where that weight lies."""
        tensors = {name: tensor.to(weight_OI.device) for name, tensor in self.tensors.items()}
        return self.kind.change(tensors, weight_OI.float(), self.settings, self.scale).float()

    @torch.no_grad()
    def bias_delta(self) -> Tensor | None:
        """Return what merging adds to the base bias, (O,) in fp32; None for nothing."""
        return self.scale * self.tensors["diff_b"] if "diff_b" in self.tensors else None

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return the Frobenius norm of what `Kind.product` returns, 0-dim.

        That is the change of the weight at strength 1, without `dora_scale`; of rotations and of ia3, which
        are relative to the weight, it is the norm of their numbers.
        """
        if isinstance(self.kind, LokrKind):  # the norm of a Kronecker product is the product of the norms
            w1, w2 = self.kind.both(self.tensors, self.settings)
            return torch.linalg.vector_norm(w1) * torch.linalg.vector_norm(w2)
        return torch.linalg.vector_norm(self.kind.product(self.tensors, self.settings))

    @torch.no_grad()
    def shrink(self, ratio: Tensor) -> None:
        """Multiply what `norm` measures by `ratio`, shared out equally among its factors."""
        present = [name for name in self.kind.factors if name in self.tensors]
        shared_out = present != ["diff", "diff_b"]  # these are no factors of each other
        for name in present:
            self.tensors[name].mul_(ratio ** (1 / len(present)) if shared_out else ratio)

    @torch.no_grad()
    def to_file(self) -> dict[str, Tensor]:
        """Return what a file has of this layer by ending of the key; a scalar is multiplied in."""
        first = next(name for name in self.kind.factors if name in self.tensors)
        trained = {
            ending(name): self._with_scalar(name) if name == first else tensor.detach()
            for name, tensor in self.tensors.items()
            if name != "scalar"
        }
        if self.size.kind == "ia3":
            return trained | {ON_INPUT: torch.tensor(int(self.settings.on_input))}
        alpha = self.settings.alpha
        return trained if alpha is None else trained | {ALPHA: torch.tensor(alpha)}

    @torch.no_grad()
    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors as `to_file` returns them, which `misfit` finds nothing wrong with."""
        for name, own in self.tensors.items():
            if name == "scalar":
                own.fill_(1.0)
            else:
                own.copy_(tensors[ending(name)])

    def misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Return why tensors of the right shapes cannot be taken over, if they cannot."""
        if self.size.kind == "ia3" and bool(tensors[ON_INPUT]) != self.settings.on_input:
            return "of what the layer takes in and puts out, it scales the other than this network"
        return None

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.tensors.items())
        return f"{self.size.kind}, alpha={self.alpha:g}, scale={self.scale:g}, {shapes}"


class _ChangeOp(torch.autograd.Function):
    """`F.linear(x, change(weight, tensors))`; backward makes the change again, so that only x is kept."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_NI: Tensor,
        weight_OI: Tensor | None,
        change: Callable[[Tensor | None, Sequence[Tensor]], Tensor],
        dtype: torch.dtype,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI, *tensors)
        ctx.change, ctx.dtype = change, dtype
        return F.linear(x_NI.to(dtype), change(weight_OI, tensors).to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, *tensors = ctx.saved_tensors
        need_x, _, _, _, *need_tensors = ctx.needs_input_grad
        grad_NO, grad_x = grad_NO.to(ctx.dtype), None
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, need_tensors, strict=True)]
            change_OI = ctx.change(weight_OI, leaves)
        if need_x:
            grad_x = torch.mm(grad_NO, change_OI.detach().to(ctx.dtype)).to(x_NI.dtype)
        grads: list[Tensor | None] = [None] * len(leaves)
        wanted = [n for n, need in enumerate(need_tensors) if need]
        if wanted:
            grad_OI = torch.mm(grad_NO.t(), x_NI.to(ctx.dtype)).to(change_OI.dtype)
            for n, grad in zip(
                wanted, torch.autograd.grad(change_OI, [leaves[n] for n in wanted], grad_OI), strict=True
            ):
                grads[n] = grad
        return grad_x, None, None, None, *grads


class _KronOp(torch.autograd.Function):
    """`F.linear(x, kron(w1, w2))`, whose matrix is never made."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_NI: Tensor, w1: Tensor, w2: Tensor, dtype: torch.dtype) -> Tensor:
        w1_AC, w2_BD = w1.to(dtype), w2.to(dtype)
        ctx.save_for_backward(x_NI, w1_AC, w2_BD)
        ctx.dtype, ctx.w_dtype = dtype, w1.dtype
        x_NCD = x_NI.to(dtype).unflatten(1, (w1_AC.shape[1], w2_BD.shape[1]))
        return torch.matmul(w1_AC, F.linear(x_NCD, w2_BD)).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, w1_AC, w2_BD = ctx.saved_tensors
        need_x, need_w1, need_w2, _ = ctx.needs_input_grad
        grad_x = grad_w1 = grad_w2 = None
        grad_NAB = grad_NO.to(ctx.dtype).unflatten(1, (w1_AC.shape[0], w2_BD.shape[0]))
        x_NCD = x_NI.to(ctx.dtype).unflatten(1, (w1_AC.shape[1], w2_BD.shape[1]))
        grad_NCB = torch.matmul(w1_AC.t(), grad_NAB)
        if need_x:
            grad_x = torch.matmul(grad_NCB, w2_BD).flatten(1).to(x_NI.dtype)
        if need_w1:
            h_NCB = F.linear(x_NCD, w2_BD)
            grad_w1 = torch.einsum("nab,ncb->ac", grad_NAB, h_NCB).to(ctx.w_dtype)
        if need_w2:
            grad_w2 = torch.mm(grad_NCB.flatten(0, 1).t(), x_NCD.flatten(0, 1)).to(ctx.w_dtype)
        return grad_x, grad_w1, grad_w2, None
