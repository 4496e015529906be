"""The LoRA of one linear layer, and the layer that carries it.

    y = W x + b + multiplier * alpha / rank * up (down x)

Notable facts:
- One autograd operation a layer, or for all layers that read the same input: see `networks.lora_op`.
- The kinds of LoRA differ in how they make the two factors that the operation multiplies (`LoRA.factors`);
  each is saved as a plain LoRA of the same effect. A DoRA (networks/dora.py) has one more tensor in its file.
- A LoRA that starts from a part of the weight itself (PiSSA, OLoRA) acts by what it has learnt since then:

      up down - up0 down0 = (up - up0) down + up0 (down - down0)

  Computed so, a new one changes no bit, and the base weight stays whole: no residual is rounded.

Shape legend: N rows (tokens, or samples), I in features, O out features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.core.seeds import generator
from library.nn.activations import Activation
from library.nn.products import Linear, layer_dtype
from library.nn.together import Joinable
from library.nn.weights.quant import restore, stored_form
from networks.dora import DoRALinearOp, Magnitude, scaled_linear
from networks.lora_op import Constants, LoRAOperand, linear_with_loras, low_rank
from networks.names import ALPHA, DORA, DOWN, UP, is_anchored
from networks.start import start_weights


@dataclass(frozen=True)
class Dropouts:
    """What training leaves out at random, as probabilities.

    neuron: single entries of `down x`. rank: whole ranks. module: the whole LoRA, for one call. every_layer:
    none is left out whole, though all is computed as if one could be: the step that takes the most.
    """

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0
    every_layer: bool = False

    def leave_out(self) -> bool:
        """Draw whether a layer goes without its LoRA in this call. In compiled code it never does: a graph
        cannot branch on a number that it draws, and multiplies by `drawn_presence`."""
        if self.module == 0 or self.every_layer or torch.compiler.is_compiling():
            return False
        return bool(torch.rand(()) < self.module)

    def drawn_presence(self, like: Tensor) -> Tensor | None:
        """Draw 0 for a layer that goes without, else 1, in compiled code; elsewhere None."""
        if self.module == 0 or self.every_layer or not torch.compiler.is_compiling():
            return None
        return (torch.rand((), device=like.device) >= self.module).to(like.dtype)


class Action(NamedTuple):
    """What a LoRA does in one call: `low_rank(x, down, up, factor)`, and a DoRA `scale` on the base layer."""

    down: Tensor
    up: Tensor
    factor: float | Tensor
    scale: Tensor | None = None
    on_output: bool = False


class LoRA(nn.Module):
    """The trainable half of one linear layer: `down` (rank, in) and `up` (out, rank), both fp32.

    A DoRA has a `magnitude` too. With `start` "pissa" or "olora" there are `start_down` and `start_up`, which
    are never trained: parameters, so that a state keeps them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float | None,
        *,
        start: str = "kaiming",
        magnitude: Magnitude | None = None,
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.alpha = float(alpha or rank)  # None and 0 mean "as the rank", that is a scale of one
        self.start = start
        self.down = nn.Parameter(torch.empty(parts * rank, in_features))
        self.up = nn.Parameter(torch.empty(out_features, rank))
        self.anchored = is_anchored(start)
        if self.anchored:
            self.start_down = nn.Parameter(torch.empty_like(self.down), requires_grad=False)
            self.start_up = nn.Parameter(torch.empty_like(self.up), requires_grad=False)
        self.magnitude = magnitude
        self.dropouts = Dropouts()
        self.set_strength(1.0)

    @property
    def strength(self) -> float:
        """The factor of `up down` at multiplier 1: alpha / rank."""
        return self.alpha / self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the matrices (R, I) and (O, R) whose product the LoRA adds, but for `strength`."""
        if not self.anchored:
            return self.down, self.spread(self.up)
        down = torch.cat([self.down, self.down - self.start_down])
        up = torch.cat([self.spread(self.up - self.start_up), self.spread(self.start_up)], dim=1)
        return down, up

    def spread(self, up: Tensor) -> Tensor:
        """Return `up` as it is multiplied with `down`."""
        return up

    @torch.no_grad()
    def to_file(self) -> dict[str, Tensor]:
        """Return the tensors of a LoRA (DoRA) file that has this one's effect, by the ending of their key."""
        down, up = self.factors()
        tensors = {DOWN: down, UP: up, ALPHA: torch.tensor(self.alpha * (len(down) // self.rank))}
        return tensors if self.magnitude is None else tensors | {DORA: self.magnitude.to_file()}

    @torch.no_grad()
    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors of the shapes that `to_file` returns, with which `misfit` finds nothing wrong."""
        self.down.copy_(tensors[DOWN])
        self.up.copy_(tensors[UP])
        if self.magnitude is not None:
            self.magnitude.from_file(tensors[DORA])

    def misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Return why tensors of the right shapes cannot be expressed by this kind, if they cannot."""
        if self.anchored:
            return f"it cannot be continued with init={self.start}, which starts from the model's own weights"
        return None

    def set_strength(self, multiplier: float) -> None:
        """Set how strongly the LoRA acts: 1 as trained, 0 not at all. `scale` is the factor of `up down`."""
        self.multiplier = multiplier
        self.scale = multiplier * self.strength

    @torch.no_grad()
    def reset(self, seed: int, name: str, layer: nn.Linear | None = None) -> None:
        """Set the start weights: a function of (seed, name), and of the layer's weight if anchored."""
        draws = generator(seed, "lora", name)
        if self.anchored and layer is not None:
            weight = layer.weight
            if weight.is_meta:
                return  # nothing has content there
        else:
            weight = torch.empty(len(self.up), self.down.shape[1], device="meta")
        down, up = self.start_from(weight, draws)
        self.down.copy_(down)
        self.up.copy_(up)
        if self.anchored:
            self.start_down.copy_(self.down)
            self.start_up.copy_(self.up)

    def start_from(self, weight: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the start weights for a layer."""
        return start_weights(self.start, weight, self.rank, self.strength, draws)

    def skips_call(self) -> bool:
        """Whether this call leaves the LoRA out: its scale is zero, or module dropout drew it."""
        return self.scale == 0.0 or (self.training and self.dropouts.leave_out())

    def is_plain(self) -> bool:
        """Whether it acts in every call, and on nothing but the layer's output."""
        return self.magnitude is None and self.scale != 0 and self.dropouts.module == 0

    def action(self, x: Tensor, layer: nn.Linear) -> Action:
        """Return what the LoRA does to input x of a layer."""
        down, up = self.factors()
        factor, multiplier = self.draw_factor(x, len(down)), self.multiplier
        present = self.dropouts.drawn_presence(x) if self.training else None
        if present is not None:
            factor, multiplier = factor * present, multiplier * present
        if self.magnitude is None:
            return Action(down, up, factor)
        ratio = self.magnitude.factor(layer.weight, down, up, self.strength)
        scale = 1 + multiplier * (ratio - 1)
        if self.magnitude.on_output:
            return Action(down, up * ratio[:, None], factor, scale, True)
        return Action(down * ratio, up, factor, scale, False)

    def draw_factor(self, x: Tensor, columns: int | None = None) -> float | Tensor:
        """Return what multiplies `down x` in this call: `scale`, where dropped 0, else / kept share.

        Rank dropout draws once for each sample of a (B, L, D) input, and once for all rows of a (L, D) one,
        whose rows may be the packed tokens of several samples. `columns`: of `down x`, if it is the trained
        ones more than once; each time the same are dropped.
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
        return factor.repeat(1, (columns or len(self.down)) // len(self.down))

    @torch.no_grad()
    def delta(self, weight: Tensor) -> Tensor:
        """Return what merging adds to the base weight, (out, in) in fp32, where that weight lies."""
        down, up = (factor.to(weight.device, torch.float32) for factor in self.factors())
        if self.magnitude is None:
            return self.scale * (up @ down)
        wide = weight.float()
        changed = self.magnitude.decompose(torch.addmm(wide, up, down, alpha=self.strength))
        return self.multiplier * (changed - wide)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return the Frobenius norm of alpha / rank * up down, which ignores a magnitude; 0-dim, fp32.

        |U D|^2 is the sum over the entries of U'U times D D', so the wide product is never made.
        """
        down, up = (factor.float() for factor in self.factors())
        return self.strength * ((up.t() @ up) * (down @ down.t())).sum().clamp_min(0).sqrt()

    @torch.no_grad()
    def shrink(self, ratio: Tensor) -> None:
        """Multiply `up down` by `ratio`, shared out equally between both matrices."""
        assert not self.anchored, "what was learnt since the start is not a product of `up` and `down` alone"
        self.down.mul_(ratio.sqrt())
        self.up.mul_(ratio.sqrt())

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        shape = f"{self.down.shape[1]} -> {self.up.shape[0]}"
        kind = ", DoRA" if self.magnitude else ""
        start = f", init={self.start}" if self.anchored else ""
        return f"{shape}, rank={self.rank}, alpha={self.alpha:g}, scale={self.scale:g}{kind}{start}"


class SplitLoRA(LoRA):
    """A LoRA of its own for each part of a fused layer's output, such as q, k and v.

    `down` (parts * rank, in) and `up` (out, rank) hold the parts' matrices one below the other. A plain LoRA
    of the same effect has the rank parts * rank and a block-diagonal `up`; its alpha is as many times larger,
    so that a reader who divides by the rank gets the trained strength.
    """

    def __init__(
        self,
        in_features: int,
        widths: Sequence[int],
        rank: int,
        alpha: float | None,
        *,
        start: str = "kaiming",
        magnitude: Magnitude | None = None,
    ) -> None:
        parts = len(widths)
        super().__init__(in_features, sum(widths), rank, alpha, start=start, magnitude=magnitude, parts=parts)
        self.widths = tuple(widths)

    def spread(self, up: Tensor) -> Tensor:
        """Return the block-diagonal matrix."""
        return torch.block_diag(*up.split(self.widths))

    def start_from(self, weight: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the start weights of all parts, each for its own rows of the layer's weight."""
        parts = [
            start_weights(self.start, rows, self.rank, self.strength, draws)
            for rows in weight.split(self.widths)
        ]
        return torch.cat([down for down, _ in parts]), torch.cat([up for _, up in parts])

    @torch.no_grad()
    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a fused LoRA."""
        super().from_file({**tensors, UP: torch.cat(self._blocks(tensors[UP]))})

    def misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Return what is wrong, also if `up` is not block-diagonal."""
        up = tensors[UP]
        if not self.anchored and not torch.equal(torch.block_diag(*self._blocks(up)), up):
            return "its parts (q, k and v) were trained together, so it cannot be continued with split_qkv"
        return super().misfit(tensors)

    def _blocks(self, up: Tensor) -> list[Tensor]:
        """Return the diagonal blocks of a fused LoRA's `up`."""
        parts = zip(up.split(self.widths), range(0, up.shape[1], self.rank), strict=True)
        return [rows[:, first : first + self.rank] for rows, first in parts]

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        return f"{super().extra_repr()}, parts={list(self.widths)}"


class LoRALinear(Joinable):
    """A linear layer with one or more LoRAs on it; stands in the model where the layer stood.

    Other kinds of networks (networks/lycoris/layer.py) can be among the LoRAs: they add to the output too.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.loras: tuple[LoRA, ...] = ()  # a tuple, so that they do not become the model's own parameters

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x and of the base weight."""
        base, dtype = self.base, self._multiplies_in(x)
        if self._has_one_plain_lora():
            return self._at_once(x, (self,), dtype)[0]
        acting = [lora for lora in self.loras if not lora.skips_call()]
        if not acting:
            return base(x)
        x_NI = _rows(x)
        actions = [lora.action(x, base) for lora in acting if isinstance(lora, LoRA)]
        y_NO = self._with_loras(x_NI, actions, dtype) if actions else base(x_NI)
        for other in acting:
            if not isinstance(other, LoRA):
                y_NO = y_NO + other(x_NI, base, dtype)
        return _like(y_NO, x)

    def with_others(self, x: Tensor, others: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """Return the outputs of this layer and others, (..., out) each."""
        layers, dtype = (self, *others), self._multiplies_in(x)
        for layer in layers:
            joins = isinstance(layer, LoRALinear) and layer._has_one_plain_lora()
            if not joins or layer._multiplies_in(x) != dtype:
                return tuple(layer(x) for layer in layers)
        return self._at_once(x, layers, dtype)

    @staticmethod
    def _at_once(x: Tensor, layers: Sequence[LoRALinear], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the outputs of layers that have one plain LoRA each."""
        outputs_NO = linear_with_loras([_rows(x)], [layer._operand(x) for layer in layers], dtype)
        return tuple(_like(y_NO, x) for y_NO in outputs_NO)

    def after(self, activation: Activation, inputs: Sequence[Tensor]) -> Tensor:
        """Return the output (..., out) for an activation's value."""
        first = inputs[0]
        if not self._has_one_plain_lora():
            return self(activation.value(*inputs))
        rows = [_rows(x) for x in inputs]
        dtype = self._multiplies_in(first)
        (y_NO,) = linear_with_loras(rows, [self._operand(first)], dtype, activation)
        return _like(y_NO, first)

    def _has_one_plain_lora(self) -> bool:
        return len(self.loras) == 1 and isinstance(self.loras[0], LoRA) and self.loras[0].is_plain()

    def _operand(self, x: Tensor) -> LoRAOperand:
        (lora,) = self.loras
        down, up, factor, *_ = lora.action(x, self.base)
        return LoRAOperand(down, up, Constants(self.base.bias, factor, *stored_form(self.base)))

    def _multiplies_in(self, x: Tensor) -> torch.dtype:
        """The dtype in which the base layer itself multiplies x."""
        return layer_dtype(x) if isinstance(self.base, Linear) else x.dtype

    def _with_loras(self, x_NI: Tensor, actions: Sequence[Action], dtype: torch.dtype) -> Tensor:
        """Return the layer's output with what LoRAs do to it."""
        way, stored = stored_form(self.base)
        (down, up, factor, scale, on_output), *more = actions
        constants = Constants(self.base.bias, factor, way, stored)
        if scale is None:
            (y_NO,) = linear_with_loras([x_NI], [LoRAOperand(down, up, constants)], dtype)
        else:
            y_NO = DoRALinearOp.apply(x_NI, down, up, scale, constants, on_output, dtype)
        for down, up, factor, scale, on_output in more:
            y_NO = y_NO + low_rank(x_NI, down, up, factor)
            if scale is not None:
                y_NO = y_NO + scaled_linear(
                    x_NI, restore(way, stored, x_NI.dtype), None, scale - 1, on_output
                )
        return y_NO


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _like(y_NO: Tensor, x: Tensor) -> Tensor:
    """Return rows of outputs in the shape of the input."""
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
