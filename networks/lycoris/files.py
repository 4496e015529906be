"""LyCORIS files, told from their headers: which kind each layer has, and which tensor is which. Torch-free.

Names of layers are those of `networks/families/known.py`, names of tensors those of the table in
`networks/lycoris/kinds.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from library.core.checkpoint_files import Checkpoint
from library.core.errors import CheckpointError
from library.core.suggest import shorten
from networks.families.known import place_in_file
from networks.names import ALPHA

if TYPE_CHECKING:
    from torch import Tensor

_WITH_WEIGHT = ("lora_up", "lora_down")  # these are modules in files, with a weight
# By kind: the tensors that must be there, and those that may. `a|b+c`: a, or else b and c.
_TENSORS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "lora": (("lora_up", "lora_down"), ("alpha", "dora_scale")),
    "loha": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("alpha", "dora_scale")),
    "lokr": (("lokr_w1|lokr_w1_a+lokr_w1_b", "lokr_w2|lokr_w2_a+lokr_w2_b"), ("alpha", "dora_scale")),
    "full": (("diff",), ("diff_b",)),
    "ia3": (("weight", "on_input"), ()),
    "diag-oft": (("oft_blocks",), ("alpha", "rescale")),
    "boft": (("oft_blocks",), ("alpha", "rescale")),
}
_MARKS = (".diff", ".on_input", ".oft_blocks", ".a1.weight", ".w_norm", ".bias_values")
_REFUSED = {
    "hada_t1": "a LoHa of convolutions",
    "lokr_t2": "a LoKr of convolutions",
    "lora_mid": "a LoRA of convolutions",
    "a1": "a GLoRA",
    "w_norm": "trained norms",
    "bias_values": "a trained bias",
}


@dataclass(frozen=True)
class LycorisLayer:
    """What a file has for one layer. `shapes`: by the names of `networks/lycoris/kinds.py`, without settings.

    `keys`: the file's key of each tensor, settings (`alpha`, `on_input`) too.
    """

    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    keys: Mapping[str, str] = field(repr=False)

    @property
    def out_features(self) -> int | None:
        """Output features of the linear layer it is for; None if any number fits."""
        return self._extent(0)

    @property
    def in_features(self) -> int | None:
        """Input features of the linear layer it is for; None if any number fits."""
        return self._extent(1)

    @property
    def rank(self) -> int:
        """The rank, or 0 for a kind that has none."""
        for name in ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if name in self.shapes:
                return self.shapes[name][0]
        return 0

    def _extent(self, side: int) -> int | None:
        shapes = self.shapes
        if self.kind == "lora":
            return shapes[("lora_up", "lora_down")[side]][side]
        if self.kind == "loha":
            return shapes[("hada_w1_a", "hada_w1_b")[side]][side]
        if self.kind == "lokr":
            parts = [(f"lokr_w{n}", f"lokr_w{n}_{'ab'[side]}") for n in (1, 2)]
            sizes = [shapes[whole if whole in shapes else factor][side] for whole, factor in parts]
            return sizes[0] * sizes[1]
        if self.kind == "full":
            return shapes["diff"][side]
        if self.kind == "ia3" or side == 1:
            return None
        return shapes["oft_blocks"][-3] * shapes["oft_blocks"][-2]


def ending(name: str) -> str:
    """Return the end of a tensor's key in a file: `lora_up` -> `.lora_up.weight`."""
    return f".{name}.weight" if name in _WITH_WEIGHT else f".{name}"


def is_lycoris(keys: Collection[str]) -> bool:
    """Whether these are keys of a network that is no plain LoRA or DoRA, but one of LyCORIS' kinds."""
    return any(key.endswith(_MARKS) or ".lokr_" in key or ".hada_" in key for key in keys)


def lycoris_layers(checkpoint: Checkpoint) -> dict[str, LycorisLayer]:
    """Return what a file has for each layer, by kohya name.

    Raises:
        CheckpointError: tensors are missing, or of kinds that are not read here.
    """
    found: dict[str, dict[str, str]] = {}
    for key in checkpoint.tensors:
        layer, name = _parted(key)
        place = place_in_file(layer)
        if place.part is not None:
            raise CheckpointError(
                f"{checkpoint.path}: '{layer}' is one of q, k and v, which are one layer here; of such "
                f"parts only plain LoRAs and DoRAs can be joined."
            )
        found.setdefault(place.path, {})[name] = key
    return {layer: _layer(checkpoint, layer, keys) for layer, keys in sorted(found.items())}


def to_kohya(tensors: Mapping[str, Tensor], layers: Mapping[str, LycorisLayer]) -> dict[str, Tensor]:
    """Return a file's tensors under kohya's names, with an alpha for each layer whose kind has one."""
    import torch  # here, because this module must be importable before torch

    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        state |= {name + ending(tensor): tensors[key] for tensor, key in layer.keys.items()}
        if layer.kind not in ("full", "ia3"):  # of rotations it is the constraint, and 0 is none
            state.setdefault(name + ALPHA, torch.tensor(float(layer.rank)))
    return state


def _parted(key: str) -> tuple[str, str]:
    """Split a key into the layer's name and the tensor's, which is as in `networks/lycoris/kinds.py`."""
    layer, _, name = key.rpartition(".")
    if name == "weight":
        before, _, last = layer.rpartition(".")
        if before and (last in (*_WITH_WEIGHT, "lora_mid") or (len(last) == 2 and last[0] in "ab")):
            return before, last
    return layer, name


def _layer(checkpoint: Checkpoint, layer: str, keys: Mapping[str, str]) -> LycorisLayer:
    shapes = {name: checkpoint.shape(key) for name, key in keys.items()}
    kind = _kind(checkpoint, layer, shapes)
    needed, optional = _TENSORS[kind]
    known = set(optional)
    for group in needed:
        ways = [way.split("+") for way in group.split("|")]
        chosen = next((way for way in ways if shapes.keys() >= set(way)), None)
        if chosen is None:
            names = " or ".join(" and ".join(way) for way in ways)
            raise CheckpointError(f"{checkpoint.path} is not complete: '{layer}' lacks its {names}.")
        known |= set(chosen)
    if unknown := sorted(keys[name] for name in keys.keys() - known):
        raise CheckpointError(f"{checkpoint.path} has keys that are no part of a {kind}: {shorten(unknown)}.")
    trained = {name: shape for name, shape in shapes.items() if name not in ("alpha", "on_input")}
    return LycorisLayer(kind, trained, dict(keys))


def _kind(checkpoint: Checkpoint, layer: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    for mark, what in _REFUSED.items():
        if mark in shapes:
            raise CheckpointError(
                f"{checkpoint.path} has {what} ('{layer}'), which cannot be read here; there are "
                f"{', '.join(_TENSORS)}."
            )
    if "oft_blocks" in shapes:
        return "boft" if len(shapes["oft_blocks"]) == 4 else "diag-oft"
    marks = {"lora_": "lora", "hada_": "loha", "lokr_": "lokr", "diff": "full", "on_input": "ia3"}
    kinds = {kind for mark, kind in marks.items() if any(name.startswith(mark) for name in shapes)}
    if len(kinds) != 1:
        raise CheckpointError(
            f"{checkpoint.path}: '{layer}' has {shorten(sorted(shapes))}, which makes no network for a "
            f"linear layer."
        )
    return kinds.pop()
