"""LoRA networks: a frozen model plus a trainable product of two thin matrices for each of some linear layers.

The arithmetic is in `networks/layer.py`. Notable facts:
- The network owns the LoRA weights, the model only borrows them: `model.to`, `model.parameters`,
  `model.state_dict` and `model.train` see nothing but the frozen model.
- Files follow kohya's names: `lora_unet_` + module path with dots as underscores + `.lora_down.weight`
  (rank, in), `.lora_up.weight` (out, rank), `.alpha` (a scalar).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.core.errors import CheckpointError
from library.core.suggest import did_you_mean, shorten
from networks.layer import Dropouts, LoRA, LoRALinear, SplitLoRA, linear_layers
from networks.names import ALPHA, DOWN, UP, kohya_name

_NO_DROPOUT = Dropouts()


@dataclass(frozen=True)
class LoRASize:
    """Rank and alpha of one LoRA, and the peak learning rate where it has one of its own.

    An alpha of None or 0 means the rank. `widths`: the layer's output is several parts of so many features,
    and each part gets a LoRA of its own, of this rank and alpha.
    """

    rank: int
    alpha: float | None
    lr: float | None = None
    widths: tuple[int, ...] = ()

    def make(self, layer: nn.Linear) -> LoRA:
        """Make the LoRA for `layer`; its weights are not set yet."""
        if self.widths:
            return SplitLoRA(layer.in_features, self.widths, self.rank, self.alpha)
        return LoRA(layer.in_features, layer.out_features, self.rank, self.alpha)


@dataclass(frozen=True)
class MaxNorm:
    """What `LoRANetwork.apply_max_norm` did. Norms are of alpha / rank * up down, after it."""

    scaled: int
    average: float
    largest: float


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
        dropouts: Dropouts = _NO_DROPOUT,
        loraplus_lr_ratio: float = 1.0,
        seed: int = 0,
        prefix: str = "lora_unet",
        group: str = "lora",
    ) -> None:
        """Make a LoRA for each path in `sizes`, without effect until it is trained or loaded.

        `prefix` is what its names in files begin with; `group` what its parameter groups are called.
        The start weights are a function of `seed` and the layer's name, whatever else is in the network.
        """
        super().__init__()
        layers = linear_layers(model)
        self.paths = {kohya_name(path, prefix): path for path in sizes}
        self.loras = nn.ModuleDict()
        for name, path in self.paths.items():
            lora = sizes[path].make(layers[path]).to(layers[path].weight.device)
            lora.reset(seed, name)
            lora.dropouts = dropouts
            self.loras[name] = lora
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self._group = group
        self._lrs = {name: sizes[path].lr for name, path in self.paths.items()}
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
        """Return optimizer groups: `params`, `lr`, `name`. Layers without a rate of their own learn at `lr`.

        LoRA+ gives `up` matrices a rate of their own.
        """
        by_lr: dict[float | None, list[LoRA]] = {}
        for name, lora in self.loras.items():
            by_lr.setdefault(self._lrs[name], []).append(lora)
        groups: list[dict[str, object]] = []
        for own, loras in by_lr.items():
            name, rate = (self._group, lr) if own is None else (f"{self._group}_{own:g}", own)
            downs, ups = [lora.down for lora in loras], [lora.up for lora in loras]
            if self.loraplus_lr_ratio == 1.0:
                groups.append({"params": downs + ups, "lr": rate, "name": name})
            else:
                groups.append({"params": downs, "lr": rate, "name": f"{name}_down"})
                groups.append({"params": ups, "lr": rate * self.loraplus_lr_ratio, "name": f"{name}_up"})
        return groups

    @torch.no_grad()
    def apply_max_norm(self, limit: float) -> MaxNorm:
        """Scale down each LoRA whose norm is above `limit`, to it (max-norm regularisation).

        Norms are Frobenius norms of alpha / rank * up down, whatever the multiplier.
        """
        norms = torch.stack([lora.norm() for lora in self.loras.values()])
        ratios = limit / norms.clamp_min(limit)
        for lora, ratio in zip(self.loras.values(), ratios.unbind(), strict=True):
            lora.shrink(ratio)
        kept = norms * ratios
        scaled, average, largest = torch.stack([(ratios < 1).sum(), kept.mean(), kept.max()]).tolist()
        return MaxNorm(int(scaled), average, largest)

    def parameter_count(self) -> int:
        """Return how many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def export_state(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return copies on the CPU under kohya's keys, weights in `dtype`; alpha stays fp32, exact."""
        state: dict[str, Tensor] = {}
        for name, lora in self.loras.items():
            down, up, alpha = lora.to_file()
            state[name + DOWN] = down.detach().to("cpu", dtype, copy=True)
            state[name + UP] = up.detach().to("cpu", dtype, copy=True)
            state[name + ALPHA] = torch.tensor(alpha)
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], source: str = "the LoRA") -> None:
        """Take weights over from tensors under kohya's keys; `source` names their file in messages.

        Raises:
            CheckpointError: a key is missing or unknown, a shape or alpha differs; nothing is changed then.
        """
        self._check(state, source)
        for name, lora in self.loras.items():
            lora.from_file(state[name + DOWN], state[name + UP])

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

        for name, lora in self.loras.items():
            if not lora.can_hold(state[name + UP]):
                raise CheckpointError(
                    f"{source}: the parts of '{name}' (q, k and v) were trained together, so it cannot be "
                    f"continued with split_qkv."
                )

    def describe(self) -> str:
        """Return one line for each layer, for people."""
        return "\n".join(f"{self.paths[name]}: {lora.extra_repr()}" for name, lora in self.loras.items())


class JointNetwork(LoRANetwork):
    """Networks of several models that are trained, switched and saved as one.

    Each is applied to its own model by itself; this only brings together what they own.
    """

    def __init__(self, networks: Sequence[LoRANetwork]) -> None:
        nn.Module.__init__(self)
        self._networks = tuple(networks)  # a tuple, so that their parameters are registered once
        self.loras = nn.ModuleDict({name: lora for n in networks for name, lora in n.loras.items()})
        self.paths = {name: path for n in networks for name, path in n.paths.items()}
        self._multiplier, self._enabled = 1.0, True

    def apply_to(self, model: nn.Module) -> None:
        """Not possible: there are several models."""
        raise TypeError("the networks of a joint one are applied one by one")

    def remove(self) -> None:
        """Take each network out of its model."""
        for network in self._networks:
            network.remove()

    def parameter_groups(self, lr: float) -> list[dict[str, object]]:
        """Return the groups of all networks."""
        return [group for network in self._networks for group in network.parameter_groups(lr)]


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
