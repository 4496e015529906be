"""A LyCORIS network: a `LoRANetwork` whose layers are of LyCORIS' kinds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from library.core.errors import CheckpointError
from networks.files import LoRAFile, LycorisFile
from networks.layer import linear_layers
from networks.lora import LoRANetwork
from networks.lycoris.files import LycorisLayer, ending
from networks.lycoris.kinds import Settings
from networks.lycoris.layer import LycorisSize
from networks.names import ALPHA, ON_INPUT


class LycorisNetwork(LoRANetwork):
    """Networks of LyCORIS' kinds for some linear layers of a model, used like LoRAs.

    `rate`: the peak learning rate, where it is not the one of `parameter_groups`.
    """

    rate: float | None = None

    def parameter_groups(self, lr: float) -> list[dict[str, object]]:
        """Return optimizer groups: `params`, `lr`, `name`. LoRA+ gives a LoRA's `up` a rate of its own.

        The lengths of a weight's rows or columns (`dora_scale`) are kept from decaying, like those of a DoRA.
        """
        rate = lr if self.rate is None else self.rate
        plain: list[nn.Parameter] = []
        ups: list[nn.Parameter] = []
        lengths: list[nn.Parameter] = []
        faster = self.loraplus_lr_ratio != 1.0
        for lora in self.loras.values():
            for name, parameter in lora.tensors.items():
                special = ups if name == "lora_up" and faster else plain
                (lengths if name == "dora_scale" else special).append(parameter)
        groups = [
            {"params": plain, "lr": rate, "name": self._group},
            {"params": ups, "lr": rate * self.loraplus_lr_ratio, "name": f"{self._group}_up"},
            {"params": lengths, "lr": rate, "weight_decay": 0.0, "name": f"{self._group}_magnitude"},
        ]
        return [group for group in groups if group["params"]]


def sizes_of_file(model: nn.Module, file: LoRAFile, paths: Mapping[str, str]) -> dict[str, LycorisSize]:
    """Return what a file has for the layers at `paths`, which are by name in it.

    Raises:
        CheckpointError: one of the model's layers is of another size.
    """
    layers, state = linear_layers(model), file.read(paths)
    sizes = {}
    for name, path in paths.items():
        found, base = _found(file, name, state), layers[path]
        shape = (found.out_features or base.out_features, found.in_features or base.in_features)
        if shape != (base.out_features, base.in_features):
            raise CheckpointError(
                f"{file.path}: '{name}' is for a layer of {shape[1]} to {shape[0]} features, but it has "
                f"{base.in_features} to {base.out_features}."
            )
        alpha = state.get(name + ALPHA)
        settings = Settings(
            alpha=None if alpha is None else alpha.item(),
            on_input=bool(state.get(name + ON_INPUT, False)),
        )
        sizes[path] = LycorisSize(found.kind, found.shapes, settings)
    return sizes


def _found(file: LoRAFile, name: str, state: Mapping[str, Tensor]) -> LycorisLayer:
    """Return what a file has for a layer; a LoRA or DoRA is a kind of LyCORIS too."""
    if isinstance(file, LycorisFile):
        return file.layers[name]
    tensors: Iterable[str] = ("lora_up", "lora_down", "dora_scale")
    keys = {tensor: name + ending(tensor) for tensor in tensors if name + ending(tensor) in state}
    return LycorisLayer("lora", {tensor: tuple(state[key].shape) for tensor, key in keys.items()}, keys)
