"""LoRA networks: a frozen model plus a trainable product of two thin matrices for each of some linear layers.

The arithmetic is in `networks/lora_op.py`, the layers in `networks/layer.py`. Notable facts:
- The network owns the LoRA weights, the model only borrows them: `model.to`, `model.parameters`,
  `model.state_dict` and `model.train` see nothing but the frozen model.
- Files follow kohya's names: `lora_unet_` + module path with dots as underscores + `.lora_down.weight`
  (rank, in), `.lora_up.weight` (out, rank), `.alpha` (a scalar), and of a DoRA `.dora_scale`, (1, in) or
  (out, 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from library.core.errors import CheckpointError, ConfigError
from library.core.suggest import did_you_mean, shorten
from library.nn.weights.quant import QuantLinear, stored_form
from networks.dora import Magnitude
from networks.fit import OTHER_WIDTH, TAKE_SIZES
from networks.layer import Dropouts, LoRA, LoRALinear, SplitLoRA, linear_layers
from networks.names import ALPHA, DORA, DOWN, ON_INPUT, UP, is_anchored, kohya_name

_NO_DROPOUT = Dropouts()
_WIDTH_AT = {DOWN: 1, UP: 0}  # which number of a shape is a width of the layer, and not the rank
# What has one dtype in every file: rounding m of a DoRA would change the weight itself.
_EXACT = {ALPHA: torch.float32, DORA: torch.float32, ON_INPUT: torch.int64}


@dataclass(frozen=True)
class LoRASize:
    """Rank and alpha of one LoRA, and the peak learning rate where it has one of its own.

    An alpha of None or 0 means the rank. `widths`: the layer's output is several parts of so many features,
    and each part gets a LoRA of its own, of this rank and alpha. `dora`: "input" or "output" for a DoRA with
    a magnitude of each input or output feature. `start`: a name from networks/start.py.
    """

    rank: int
    alpha: float | None
    lr: float | None = None
    widths: tuple[int, ...] = ()
    dora: str | None = None
    start: str = "kaiming"

    def make(self, path: str, layer: nn.Linear, device: torch.device) -> LoRA:
        """Make the LoRA for the layer at `path` on `device`; its weights are not set yet.

        Raises:
            ConfigError: the layer has fewer singular values than the rank, for start weights made of them.
        """
        most = min(layer.in_features, *(self.widths or (layer.out_features,)))
        if is_anchored(self.start) and self.rank > most:
            raise ConfigError(
                f"init={self.start} makes a LoRA of up to rank {most} for '{path}', which has no more "
                f"singular values, but its rank is {self.rank}; lower it."
            )
        magnitude = None
        if self.dora is not None:
            magnitude = Magnitude(layer.weight, on_output=self.dora == "output", device=device)
        kind = {"start": self.start, "magnitude": magnitude}
        if self.widths:
            lora = SplitLoRA(layer.in_features, self.widths, self.rank, self.alpha, **kind)
        else:
            lora = LoRA(layer.in_features, layer.out_features, self.rank, self.alpha, **kind)
        return lora.to(device)


class LoRANetwork(nn.Module):
    """LoRAs for some linear layers of a model: what is trained, saved and applied.

    The weights are fp32. `apply_to` puts the network into the model, `remove` takes it out again and leaves
    the very layers that were there before.
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
        ignored: tuple[str, ...] = (),
        device: torch.device | None = None,
    ) -> None:
        """Make a LoRA for each path in `sizes`, without effect until it is trained or loaded.

        The start weights are a function of `seed`, the layer's name and its weight, whatever else is in the
        network.

        Args:
            prefix: what its names in files begin with. group: what its parameter groups are called.
            ignored: beginnings of names in other tools' files that have no effect on the model.
            device: where its weights shall lie; None: where each layer's weight lies.
        """
        super().__init__()
        layers = linear_layers(model)
        self.paths = {kohya_name(path, prefix): path for path in sizes}
        self.loras = nn.ModuleDict()
        for name, path in self.paths.items():
            layer = layers[path]
            lora = sizes[path].make(path, layer, device or stored_form(layer)[1][0].device)
            lora.reset(seed, name, layer)
            lora.dropouts = dropouts
            self.loras[name] = lora
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.ignored = ignored
        self._group = group
        self._lrs = {name: sizes[path].lr for name, path in self.paths.items()}
        self._multiplier, self._enabled = 1.0, True
        self._places: list[tuple[nn.Module, str]] = []

    def use_every_layer(self) -> None:
        """Leave no layer's LoRA out, whatever module dropout says, so that a step takes the most it can."""
        for lora in self.loras.values():
            lora.dropouts = replace(lora.dropouts, every_layer=True)

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

    def parameter_groups(self, lr: float) -> list[dict[str, object]]:
        """Return optimizer groups: `params`, `lr`, `name`. Layers without a rate of their own learn at `lr`.

        LoRA+ gives `up` matrices a rate of their own. Magnitudes of DoRAs are kept from decaying: they are
        lengths of the model's own weights, of which none should shrink for being there.
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
            scales = [lora.magnitude.dora_scale for lora in loras if lora.magnitude is not None]
            if scales:
                groups.append(
                    {"params": scales, "lr": rate, "weight_decay": 0.0, "name": f"{name}_magnitude"}
                )
        return groups

    @torch.no_grad()
    def apply_max_norm(self, limit: float) -> Tensor:
        """Scale down each LoRA whose norm is above `limit`, to it (max-norm regularisation).

        Norms are Frobenius norms of alpha / rank * up down, whatever the multiplier.

        Returns:
            (3,): how many were above the limit, and the mean and the largest of the norms after it; perhaps
            still in the making on the device.
        """
        norms = torch.stack([lora.norm() for lora in self.loras.values()])
        ratios = limit / norms.clamp_min(limit)
        for lora, ratio in zip(self.loras.values(), ratios.unbind(), strict=True):
            lora.shrink(ratio)
        kept = norms * ratios
        return torch.stack([(ratios < 1).sum(), kept.mean(), kept.max()])

    def parameter_count(self) -> int:
        """Return how many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    @torch.no_grad()
    def export_state(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return copies on the CPU under kohya's keys, weights in `dtype`; alpha and dora_scale stay fp32."""
        return {
            name + ending: tensor.detach().to("cpu", _EXACT.get(ending, dtype), copy=True)
            for name, lora in self.loras.items()
            for ending, tensor in lora.to_file().items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], source: str = "the LoRA") -> None:
        """Take weights over from tensors under kohya's keys; `source` names their file in messages.

        Raises:
            CheckpointError: a key is missing or unknown, a shape or alpha differs; nothing is changed then.
        """
        state = {key: tensor for key, tensor in state.items() if not key.startswith(self.ignored)}
        needed = {name: lora.to_file() for name, lora in self.loras.items()}
        _check_keys(state, {name + ending for name, own in needed.items() for ending in own}, source)
        theirs = {name: {ending: state[name + ending] for ending in own} for name, own in needed.items()}
        for name, lora in self.loras.items():
            _check_layer(name, lora, needed[name], theirs[name], source)
        for name, lora in self.loras.items():
            lora.from_file(theirs[name])

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
        self.ignored = tuple(beginning for n in networks for beginning in n.ignored)
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


def _check_keys(state: Mapping[str, Tensor], needed: set[str], source: str) -> None:
    """Raise CheckpointError unless `state` has the needed keys and no others."""
    missing, unknown = sorted(needed - state.keys()), sorted(state.keys() - needed)
    if unknown and all(key.endswith(DORA) for key in unknown):
        raise CheckpointError(f"{source} is a DoRA and this network is none; {TAKE_SIZES}")
    if unknown:
        near = did_you_mean(unknown[0], needed) or "; " + TAKE_SIZES
        raise CheckpointError(
            f"{source} has {len(unknown)} keys that this network lacks: {shorten(unknown)}{near}"
        )
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} keys of this network: {shorten(missing)}; {TAKE_SIZES}"
        )


def _check_layer(
    name: str, lora: LoRA, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], source: str
) -> None:
    """Raise CheckpointError unless the tensors of one layer are such as it has."""
    for ending, tensor in own.items():
        found, needed = tuple(theirs[ending].shape), tuple(tensor.shape)
        if found != needed:
            place = _WIDTH_AT.get(ending)
            same_layer = place is None or found[place : place + 1] == needed[place : place + 1]
            raise CheckpointError(
                f"{source}: '{name}{ending}' has shape {found}, but this network needs {needed}; "
                f"{TAKE_SIZES if same_layer else OTHER_WIDTH}"
            )
    alpha = own.get(ALPHA)
    if alpha is not None and theirs[ALPHA] != alpha.to(theirs[ALPHA].dtype):
        raise CheckpointError(
            f"{source}: '{name}{ALPHA}' is {theirs[ALPHA].item():g}, but this network has alpha "
            f"{alpha.item():g}; {TAKE_SIZES}"
        )
    if (reason := lora.misfit(theirs)) is not None:
        raise CheckpointError(f"{source}, '{name}': {reason}.")


@torch.no_grad()
def merge(model: nn.Module, networks: Iterable[LoRANetwork]) -> None:
    """Add networks to the weights of `model`: summed in fp32, then rounded once to the weight's dtype.

    Where the weights are quantised, they are quantised anew. What is replaced is not kept.
    """
    layers = linear_layers(model)
    active: dict[str, list[LoRA]] = {}
    for network in networks:
        for name, path in network.paths.items():
            if network.loras[name].scale != 0.0:
                active.setdefault(path, []).append(network.loras[name])
    for path, loras in active.items():
        layer = layers[path]
        weight, bias = layer.weight, layer.bias
        total = weight.float() + sum(lora.delta(weight) for lora in loras)
        if isinstance(layer, QuantLinear):
            layer.quantise(total, weight.device)
        else:
            layer.weight = nn.Parameter(total.to(weight.dtype), requires_grad=False)
        deltas = [lora.bias_delta() for lora in loras if not isinstance(lora, LoRA)]
        changes = [delta.to(weight.device) for delta in deltas if delta is not None]
        if changes:
            moved = (bias.float() + sum(changes)).to(bias.dtype)
            layer.bias = nn.Parameter(moved, requires_grad=False)
