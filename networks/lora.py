"""LoRA: a frozen linear layer plus a trainable product of two thin matrices.

    y = W x + b + multiplier * alpha / rank * up (down x)

Notable facts:
- One autograd operation a layer. The low-rank part is accumulated into the base layer's output in place, both
  ways, so no second full-width tensor is ever made; only x and the rank-wide `down x` are kept for backward.
- `low_rank` and plain `F.linear` are the reference implementation; tests hold the fast one against it.
- LoRA weights are fp32 and are cast to the activations' dtype inside the operation.
- The network owns the LoRA weights, the model only borrows them: `model.to`, `model.parameters`,
  `model.state_dict` and `model.train` see nothing but the frozen model.
- Files follow kohya's names: `lora_unet_` + module path with dots as underscores + `.lora_down.weight`
  (rank, in), `.lora_up.weight` (out, rank), `.alpha` (a scalar).

Shape legend: N rows (tokens, or samples), I in features, O out features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from library.core.errors import CheckpointError
from library.core.seeds import generator
from library.core.suggest import did_you_mean, shorten
from library.nn.products import Linear, layer_dtype
from networks.files import ALPHA, DOWN, UP, kohya_name


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
        factor = torch.full((1, self.rank), self.scale, dtype=x.dtype, device=x.device)
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
        return self.scale * (self.up.float() @ self.down.float())

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        shape = f"{self.down.shape[1]} -> {self.up.shape[0]}"
        return f"{shape}, rank={self.rank}, alpha={self.alpha:g}, scale={self.scale:g}"


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
        y_NO = _LoRALinearOp.apply(x_NI, base.weight, base.bias, lora.down, lora.up, factor, dtype)
        for lora, factor in more:
            y_NO = y_NO + low_rank(x_NI, lora.down, lora.up, factor)
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


@dataclass(frozen=True)
class LoRASize:
    """Rank and alpha of one LoRA; an alpha of None or 0 means the rank."""

    rank: int
    alpha: float | None


class LoRANetwork(nn.Module):
    """LoRAs for some linear layers of a model: what is trained, saved and applied.

    The weights are fp32 and lie where the layers' weights lie when the network is made. `apply_to` puts the
    network into the model, `remove` takes it out again and leaves the very layers that were there before.
    """

    def __init__(
        self,
        model: nn.Module,
        sizes: Mapping[str, LoRASize],
        *,
        dropouts: Dropouts = Dropouts(),
        loraplus_lr_ratio: float = 1.0,
        seed: int = 0,
        prefix: str = "lora_unet",
    ) -> None:
        """Make a LoRA for each path in `sizes`, without effect until it is trained or loaded.

        The start weights are a function of `seed` and the layer's name, whatever else is in the network.
        """
        super().__init__()
        layers = linear_layers(model)
        self.paths = {kohya_name(path, prefix): path for path in sizes}
        self.loras = nn.ModuleDict()
        for name, path in self.paths.items():
            layer, size = layers[path], sizes[path]
            lora = LoRA(layer.in_features, layer.out_features, size.rank, size.alpha).to(layer.weight.device)
            lora.reset(seed, name)
            lora.dropouts = dropouts
            self.loras[name] = lora
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self._multiplier, self._enabled = 1.0, True
        self._places: list[tuple[nn.Module, str]] = []

    @property
    def multiplier(self) -> float:
        """How strongly the network acts; 1 as trained, 0 not at all (the base model, bit for bit)."""
        return self._multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        self._multiplier = float(value)
        self._update_strength()

    @property
    def enabled(self) -> bool:
        """Whether the network acts. Switching it off and on again leaves the multiplier as it was."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = bool(value)
        self._update_strength()

    def _update_strength(self) -> None:
        for lora in self.loras.values():
            lora.set_strength(self._multiplier if self._enabled else 0.0)

    def apply_to(self, model: nn.Module) -> None:
        """Put each LoRA on its layer of `model`. The effects of several networks on one model add up."""
        assert not self._places, "this network is already applied to a model"
        for name, path in self.paths.items():
            parent_path, _, leaf = path.rpartition(".")
            parent = model.get_submodule(parent_path)
            layer = getattr(parent, leaf)
            if not isinstance(layer, LoRALinear):
                layer = LoRALinear(layer)
                setattr(parent, leaf, layer)
            layer.loras += (self.loras[name],)
            self._places.append((parent, leaf))

    def remove(self) -> None:
        """Take the network out of the model it was applied to."""
        for lora, (parent, leaf) in zip(self.loras.values(), self._places, strict=True):
            layer = getattr(parent, leaf)
            layer.loras = tuple(other for other in layer.loras if other is not lora)
            if not layer.loras:
                setattr(parent, leaf, layer.base)
        self._places.clear()

    def merge_into(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Add the network to the weights of `model`, at its present multiplier; see `merge`."""
        return merge(model, [self])

    def parameter_groups(self, lr: float) -> list[dict[str, object]]:
        """Return optimizer groups: `params`, `lr`, `name`. LoRA+ gives `up` matrices a rate of their own."""
        downs = [lora.down for lora in self.loras.values()]
        ups = [lora.up for lora in self.loras.values()]
        if self.loraplus_lr_ratio == 1.0:
            return [{"params": downs + ups, "lr": lr, "name": "lora"}]
        return [
            {"params": downs, "lr": lr, "name": "lora_down"},
            {"params": ups, "lr": lr * self.loraplus_lr_ratio, "name": "lora_up"},
        ]

    def parameter_count(self) -> int:
        """Return how many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def export_state(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return copies on the CPU under kohya's keys, weights in `dtype`; alpha stays fp32, exact."""
        state: dict[str, Tensor] = {}
        for name, lora in self.loras.items():
            state[name + DOWN] = lora.down.detach().to("cpu", dtype, copy=True)
            state[name + UP] = lora.up.detach().to("cpu", dtype, copy=True)
            state[name + ALPHA] = torch.tensor(lora.alpha)
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], source: str = "the LoRA") -> None:
        """Take weights over from tensors under kohya's keys; `source` names their file in messages.

        Raises:
            CheckpointError: a key is missing or unknown, a shape or alpha differs; nothing is changed then.
        """
        self._check(state, source)
        for name, lora in self.loras.items():
            lora.down.copy_(state[name + DOWN])
            lora.up.copy_(state[name + UP])

    def _check(self, state: Mapping[str, Tensor], source: str) -> None:
        needed = self.export_state()
        missing, unknown = sorted(needed.keys() - state.keys()), sorted(state.keys() - needed.keys())
        if unknown:
            raise CheckpointError(
                f"{source} has {len(unknown)} keys that this network lacks: {shorten(unknown)}"
                f"{did_you_mean(unknown[0], needed) or '.'}"
            )
        if missing:
            raise CheckpointError(f"{source} lacks {len(missing)} keys of this network: {shorten(missing)}.")
        for key, own in needed.items():
            theirs = state[key]
            if theirs.shape != own.shape:
                raise CheckpointError(
                    f"{source}: '{key}' has shape {tuple(theirs.shape)}, but this network needs "
                    f"{tuple(own.shape)}; the ranks must be those that the file was trained with."
                )
            if key.endswith(ALPHA) and theirs != own.to(theirs.dtype):
                raise CheckpointError(
                    f"{source}: '{key}' is {theirs.item():g}, but this network has alpha {own.item():g}; "
                    f"they must be the same."
                )

    def describe(self) -> str:
        """Return one line for each layer, for people."""
        return "\n".join(f"{self.paths[name]}: {lora.extra_repr()}" for name, lora in self.loras.items())


@torch.no_grad()
def merge(model: nn.Module, networks: Iterable[LoRANetwork]) -> dict[str, nn.Parameter]:
    """Add networks to the weights of `model`: summed in fp32, rounded once to the weight's dtype.

    Returns:
        The weights that were replaced, by layer path, for `unmerge`. Drop them to free their memory.
    """
    layers = linear_layers(model)
    active: dict[str, list[LoRA]] = {}
    for network in networks:
        for name, path in network.paths.items():
            if network.loras[name].scale != 0.0:
                active.setdefault(path, []).append(network.loras[name])
    originals: dict[str, nn.Parameter] = {}
    for path, loras in active.items():
        weight = layers[path].weight
        total = weight.float() + sum(lora.delta().to(weight.device) for lora in loras)
        layers[path].weight = nn.Parameter(total.to(weight.dtype), requires_grad=False)
        originals[path] = weight
    return originals


def unmerge(model: nn.Module, originals: Mapping[str, nn.Parameter]) -> None:
    """Put back the weights that `merge` returned: the same tensors, so nothing is lost to rounding."""
    layers = linear_layers(model)
    for path, weight in originals.items():
        layers[path].weight = weight
