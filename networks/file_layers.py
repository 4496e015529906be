"""Which layer each tensor of a LoRA file belongs to, by the names of many tools. Torch-free.

Names of layers are those of `networks/families/known.py`. Notable facts:
- The strength alpha / rank comes from `.alpha` or `.lora_alpha` tensors, else from the adapter's settings (in
  the metadata, as diffusers writes them, or in adapter_config.json), else it is 1, as diffusers and kohya
  take it.
- LoRAs of q, k and v become one of the fused layer: `down` one below the other, `up` block-diagonal. If all
  three have the same `down`, they were one LoRA of that layer, and become it again.
- A DoRA's magnitudes are `.dora_scale`, (1, in) or (out, 1), or PEFT's `.lora_magnitude_vector`, (out,).

Shape legend: see `networks/layer.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from struct import calcsize, unpack
from typing import TYPE_CHECKING, BinaryIO

from library.core.checkpoint_files import Checkpoint
from library.core.errors import CheckpointError
from library.core.suggest import shorten
from networks.families.known import place_in_file, without_prefix
from networks.names import ALPHA, DORA, DOWN, UP

if TYPE_CHECKING:
    from torch import Tensor

# A name of an adapter may stand before "weight"; old diffusers say lora.up and lora_linear_layer.up.
_KEY = re.compile(
    r"(?P<module>.+)\.(lora_(?P<side>A|B|down|up)|lora(_linear_layer)?\.(?P<old>down|up))"
    r"((\.(?!weight)[^.]+)?\.weight)?"
)
_MAGNITUDE = re.compile(r"(?P<module>.+)\.(dora_scale|lora_magnitude_vector((\.(?!weight)[^.]+)?\.weight)?)")
_REST_ELSEWHERE = re.compile(r"pissa.*|olora|corda|loftq")  # starts of peft that change the model's weights
_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h"}  # of struct
_ALPHA_KEYS = (ALPHA, ".lora_alpha")


@dataclass(frozen=True)
class Part:
    """The LoRA of one layer in the file. `alpha` holds unless the file has it as a tensor, `alpha_key`.

    in_features, out_features: of the layer it is for, or of the part of one. dora_key, dora: the magnitudes
    of a DoRA, and whether they are of "input" or "output" features.
    """

    down: str
    up: str
    in_features: int
    out_features: int
    rank: int
    alpha: float
    alpha_key: str | None
    dora_key: str | None = None
    dora: str | None = None

    @property
    def keys(self) -> set[str]:
        """The names of its tensors."""
        return {key for key in (self.down, self.up, self.alpha_key, self.dora_key) if key}

    def strength(self, content: Content) -> float:
        """Return alpha / rank."""
        return (self.alpha if self.alpha_key is None else content.number(self.alpha_key)) / self.rank


@dataclass(frozen=True)
class Layer:
    """The LoRA of one layer in the model: one part, or those of q, k and v, of which some may be missing.

    `shared`: all parts have the same `down`, so they are one LoRA of the fused layer.
    """

    parts: tuple[Part | None, ...]
    shared: bool = False

    @property
    def present(self) -> tuple[Part, ...]:
        """The parts that there are."""
        return tuple(part for part in self.parts if part is not None)

    @property
    def rank(self) -> int:
        """The rank of the LoRA that it becomes."""
        return self.present[0].rank if self.shared else sum(part.rank for part in self.present)

    def alpha(self, content: Content) -> float:
        """Return the alpha of the LoRA that it becomes: parts of different strength become one of 1."""
        strengths = {part.strength(content) for part in self.present}
        return self.rank * (strengths.pop() if len(strengths) == 1 else 1)

    @property
    def in_features(self) -> int:
        """Input features of the linear layer it is for."""
        return self.present[0].in_features

    @property
    def out_features(self) -> int | None:
        """Output features of the linear layer it is for; None if a part is missing that would tell."""
        return None if None in self.parts else sum(part.out_features for part in self.present)

    @property
    def dora(self) -> str | None:
        """Of which features a DoRA has magnitudes; None for a plain LoRA."""
        return self.present[0].dora


def layers_in(checkpoint: Checkpoint) -> dict[str, Layer]:
    """Return the LoRAs of a file by kohya name.

    Raises:
        CheckpointError: it has none, is not complete, or holds more than plain LoRAs and DoRAs.
    """
    found: dict[str, dict[str, str]] = {}
    for key in checkpoint.tensors:
        if match := _KEY.fullmatch(key):
            side = "down" if (match["side"] or match["old"]) in ("A", "down") else "up"
            found.setdefault(match["module"], {})[side] = key
    if not found:
        first = min(checkpoint.tensors, default=None)
        example = f"the first is '{first}'" if first else "it is empty"
        raise CheckpointError(
            f"{checkpoint.path} is not a LoRA: none of its keys ends in '{DOWN}' or '.lora_A.weight' "
            f"({example})."
        )
    for key in checkpoint.tensors:
        if (match := _MAGNITUDE.fullmatch(key)) and match["module"] in found:
            found[match["module"]]["dora"] = key
    settings = _settings(checkpoint)
    layers: dict[str, list[Part | None]] = {}
    for module, keys in found.items():
        part = _part(checkpoint, module, keys, settings)
        name, place = place_in_file(module)
        parts = layers.setdefault(name, [None] * (1 if place is None else 3))
        if (place is None) != (len(parts) == 1) or parts[place or 0] is not None:
            raise CheckpointError(f"{checkpoint.path} has more than one LoRA for the layer of '{module}'.")
        parts[place or 0] = part
    _check(checkpoint, layers.values())
    content = Content(checkpoint)
    return {name: Layer(tuple(parts), _shared(parts, content)) for name, parts in sorted(layers.items())}


def to_kohya(tensors: Mapping[str, Tensor], layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Return the tensors of some layers of a file under kohya's names."""
    import torch  # here, because this module must be importable before torch

    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        parts = layer.present
        scales = [(tensors[p.alpha_key].item() if p.alpha_key else p.alpha) / p.rank for p in parts]
        downs, ups = [tensors[p.down] for p in parts], [tensors[p.up] for p in parts]
        if len(set(scales)) > 1:  # one alpha for all: what differs goes into the weights
            ups = [up.float() * scale for up, scale in zip(ups, scales, strict=True)]
            scales = [1.0]
        if len(layer.parts) == 3 and not layer.shared:
            empty = ups[-1].new_zeros(len(ups[-1]), 0)  # a part without a LoRA: rows, but no columns
            filled = iter(ups)
            ups = [empty if part is None else next(filled) for part in layer.parts]
        state[name + DOWN] = downs[0] if layer.shared else torch.cat(downs)
        if layer.shared:
            state[name + UP] = torch.cat(ups)
        else:
            state[name + UP] = torch.block_diag(*ups) if len(ups) > 1 else ups[0]
        # Alone, its alpha is that of the file, to the bit.
        alpha = tensors[parts[0].alpha_key].item() if len(parts) == 1 and parts[0].alpha_key else None
        state[name + ALPHA] = torch.tensor(scales[0] * layer.rank if alpha is None else alpha)
        if layer.dora:
            magnitudes = torch.cat([tensors[part.dora_key].flatten() for part in parts])
            state[name + DORA] = magnitudes.unsqueeze(1 if layer.dora == "output" else 0)
    return state


def _part(checkpoint: Checkpoint, module: str, keys: Mapping[str, str], settings: _Settings) -> Part:
    """Return where the LoRA of one module is."""
    if "down" not in keys or "up" not in keys:
        raise CheckpointError(
            f"{checkpoint.path} is not complete: '{module}' lacks its down (A) or up (B) weight."
        )
    down, up = checkpoint.shape(keys["down"]), checkpoint.shape(keys["up"])
    if min(len(down), len(up)) < 2 or down[0] != up[1]:
        raise CheckpointError(
            f"{checkpoint.path}: '{keys['down']}' has shape {down} and '{keys['up']}' {up}, which are no "
            f"(rank, in) and (out, rank) of one LoRA."
        )
    rank, in_features, out_features = *down[:2], up[0]
    alpha_key = next((module + end for end in _ALPHA_KEYS if module + end in checkpoint.tensors), None)
    alpha = settings.alpha(without_prefix(module), rank)
    part = Part(keys["down"], keys["up"], in_features, out_features, rank, alpha, alpha_key)
    if "dora" not in keys:
        return part
    features = {(out_features,): "output", (out_features, 1): "output", (1, in_features): "input"}
    shape = checkpoint.shape(keys["dora"])
    if shape not in features:
        raise CheckpointError(
            f"{checkpoint.path}: '{keys['dora']}' has shape {shape}, which is neither one number for each "
            f"input feature nor one for each output feature of its layer."
        )
    return replace(part, dora_key=keys["dora"], dora=features[shape])


class Content:
    """The bytes of a checkpoint's tensors, of whatever type."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._offsets: dict[Path, dict[str, tuple[int, int]]] = {}

    def of(self, key: str) -> bytes:
        """Return the bytes of one tensor."""
        info = self._checkpoint.tensors[key]
        with open(info.file, "rb") as handle:
            if info.file not in self._offsets:
                self._offsets[info.file] = _offsets(handle)
            first, last = self._offsets[info.file][info.name]
            handle.seek(first)
            return handle.read(last - first)

    def number(self, key: str) -> float:
        """Return a tensor of one number. Raises CheckpointError for any other."""
        content, kind = self.of(key), self._checkpoint.tensors[key].dtype
        if kind == "BF16":
            content, kind = bytes(2) + content, "F32"
        if kind not in _FORMATS or len(content) != calcsize(_FORMATS[kind]):
            raise CheckpointError(f"{self._checkpoint.path}: '{key}' is not a single number.")
        return float(unpack(_FORMATS[kind], content)[0])


def _offsets(handle: BinaryIO) -> dict[str, tuple[int, int]]:
    """Return where each tensor of a safetensors file begins and ends."""
    length = int.from_bytes(handle.read(8), "little")
    header = json.loads(handle.read(length))
    start = 8 + length
    ends = {name: info["data_offsets"] for name, info in header.items() if name != "__metadata__"}
    return {name: (start + first, start + last) for name, (first, last) in ends.items()}


def _shared(parts: Sequence[Part | None], content: Content) -> bool:
    """Whether q, k and v have one `down`. Its bytes are compared without torch, but for a header's price."""
    if len(parts) < 3 or None in parts or len({part.rank for part in parts}) > 1:
        return False
    first, *others = (content.of(part.down) for part in parts)
    return all(other == first for other in others)


def _check(checkpoint: Checkpoint, layers: Iterable[Sequence[Part | None]]) -> None:
    """Raise CheckpointError for tensors that are no part of a LoRA, and for parts that cannot be joined."""
    known: set[str] = set()
    for layer in layers:
        parts = [part for part in layer if part]
        known = known.union(*(part.keys for part in parts))
        if len(layer) == 1:
            continue
        if layer[0] is None or len(parts) < 2:
            raise CheckpointError(
                f"{checkpoint.path}: beside '{parts[0].down}' there must be LoRAs for the query and for the "
                f"key or value of the same layer; without them the sizes of the fused layer cannot be told."
            )
        if any(part.dora for part in parts) and [p and p.dora for p in layer] != ["output"] * 3:
            raise CheckpointError(
                f"{checkpoint.path}: the layer of '{parts[0].down}' has q, k and v together here, and their "
                f"DoRAs can be joined only if all three have a magnitude for each output feature."
            )
    unknown = sorted(checkpoint.tensors.keys() - known)
    if unknown:
        raise CheckpointError(
            f"{checkpoint.path} has {len(unknown)} tensors that are no part of a LoRA: {shorten(unknown)}."
        )


@dataclass(frozen=True)
class _Settings:
    """What PEFT's LoraConfig says about strength."""

    lora_alpha: float | None = None
    alpha_pattern: Mapping[str, float] | None = None
    use_rslora: bool = False

    def alpha(self, module: str, rank: int) -> float:
        """Return the alpha whose quotient with the rank is the strength of a module's LoRA."""
        alpha = self.lora_alpha
        for pattern, value in (self.alpha_pattern or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        if alpha is None:
            return rank
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


def _check_start(checkpoint: Checkpoint, start: str) -> None:
    """Raise CheckpointError if an adapter is for a model whose own weights peft changed at the start."""
    if _REST_ELSEWHERE.fullmatch(start):
        raise CheckpointError(
            f"{checkpoint.path} started with init_lora_weights={start}: it is for what peft left of the "
            f"model's weights, not for the model. Save it with path_initial_model_for_weight_conversion of "
            f"peft, which makes a LoRA for the model of it."
        )


def _is_of_peft(checkpoint: Checkpoint) -> bool:
    """Whether a file is one that settings beside it are for."""
    named = checkpoint.files[0].name.startswith("adapter_model")
    return named or all(key.startswith("base_model.model.") for key in checkpoint.tensors)


def _settings(checkpoint: Checkpoint) -> _Settings:
    """Read the adapter's settings from the metadata or from adapter_config.json beside the file."""
    beside = checkpoint.files[0].with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" in checkpoint.metadata:
            stored = json.loads(checkpoint.metadata["lora_adapter_metadata"])
            found = {key.removeprefix("transformer."): value for key, value in stored.items()}
        elif beside.is_file() and _is_of_peft(checkpoint):
            found = json.loads(Path(beside).read_text(encoding="utf-8"))
        else:
            return _Settings()
        _check_start(checkpoint, str(found.get("init_lora_weights")))
        alphas = {str(pattern): float(value) for pattern, value in (found.get("alpha_pattern") or {}).items()}
        return _Settings(float(found["lora_alpha"]), alphas, bool(found.get("use_rslora")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: the adapter's settings cannot be read ({type(error).__name__}: {error})."
        ) from None
