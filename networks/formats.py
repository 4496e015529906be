"""A network's tensors under the names of other tools, from those under kohya's.

    comfyui     diffusion_model.<path>.lora_A.weight, .lora_B.weight, .alpha    what LyCORIS trains, too
    diffusers   transformer.<path in diffusers>.lora_A.weight, .lora_B.weight   and settings in the metadata
    peft        base_model.model.<path in diffusers>.lora_A.weight, ...         and settings in a file beside

Notable facts:
- The last two have no place for alpha that all readers look at, so alpha / rank is in `lora_B`, and the
  settings say alpha = rank: without them the strength is right as well.
- diffusers has q, k and v of Lumina apart. A LoRA of the fused layer becomes three with the same `lora_A`,
  or, if each column of `up` is of one part only (split_qkv), three with only what they need.
- A DoRA of the lengths of rows keeps them as PEFT's `lora_magnitude_vector`.

Shape legend: see `networks/layer.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.core.errors import CheckpointError
from networks.families.family import Family
from networks.families.known import family_of
from networks.families.lumina import qkv_widths
from networks.names import ALPHA, DORA, DOWN, MAGNITUDE, UP

SETTINGS_KEY = "lora_adapter_metadata"  # of a file's metadata: where diffusers keeps an adapter's settings
_A, _B = ".lora_A.weight", ".lora_B.weight"
_COMFYUI = {DOWN: _A, UP: _B}


@dataclass(frozen=True)
class Adapter:
    """A LoRA under diffusers' names without a prefix, and what PEFT's LoraConfig must say of it."""

    tensors: dict[str, Tensor]
    settings: dict[str, object]

    def prefixed(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors with `prefix` before their names."""
        return {f"{prefix}.{key}": tensor for key, tensor in self.tensors.items()}

    def metadata(self) -> dict[str, str]:
        """Return the settings as diffusers keeps them in a file."""
        packed = {f"transformer.{key}": value for key, value in self.settings.items()}
        return {SETTINGS_KEY: json.dumps(packed, sort_keys=True)}


def to_comfyui(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return tensors under ComfyUI's names.

    Raises:
        CheckpointError: `source` has a layer that no known family has, or one of a text encoder.
    """
    renamed: dict[str, Tensor] = {}
    for path, tensors in _by_path(state, source)[1]:
        renamed |= {f"diffusion_model.{path}{_COMFYUI.get(end, end)}": t for end, t in tensors.items()}
    return renamed


def to_diffusers(state: Mapping[str, Tensor], source: str) -> Adapter:
    """Return LoRAs under diffusers' names; `source` is what messages call them.

    Raises:
        CheckpointError: there is a layer that no known family has, or one of a text encoder, or of a kind
            that cannot be expressed.
    """
    family, layers = _by_path(state, source)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, layer in layers:
        _require_lora(path, layer, source)
        for name, part in zip(family.diffusers_names(path), _parts(family, path, layer), strict=True):
            if part is not None:
                copies = {end: t.clone(memory_format=torch.contiguous_format) for end, t in part.items()}
                tensors |= {name + end: copy for end, copy in copies.items()}
                ranks[name] = len(part[_A])
    doras = sum(key.endswith(MAGNITUDE) for key in tensors)
    if doras not in (0, len(ranks)):
        raise CheckpointError(f"{source} has LoRAs and DoRAs, and in diffusers all must be of one kind.")
    return Adapter(tensors, _settings(ranks, dora=bool(doras)))


def _by_path(
    state: Mapping[str, Tensor], source: str
) -> tuple[Family, Iterator[tuple[str, dict[str, Tensor]]]]:
    """Return the family, and the tensors of each layer by the ending of their key."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, dot, end = key.partition(".")
        layers.setdefault(name, {})[dot + end] = tensor
    family = family_of(layers)
    paths = {name: family.path_of(name) if family else None for name in layers}
    strange = [name for name, path in paths.items() if path is None]
    if family is None or strange:
        raise CheckpointError(
            f"{source} has '{(strange or ['nothing'])[0]}', which is no layer of a model that is known here; "
            f"other names can be found for those only."
        )
    return family, ((paths[name], tensors) for name, tensors in layers.items())


def _require_lora(path: str, layer: Mapping[str, Tensor], source: str) -> None:
    if not {DOWN, UP, ALPHA} <= layer.keys() <= {DOWN, UP, ALPHA, DORA}:
        raise CheckpointError(
            f"{source} has '{path}', which is neither a LoRA nor a DoRA; diffusers has no names for it."
        )
    if DORA in layer and layer[DORA].shape != (len(layer[UP]), 1):
        raise CheckpointError(
            f"{source} has a DoRA of '{path}' with a length for each column of the weight; diffusers knows "
            f"only those with a length for each row (wd_on_output)."
        )


def _parts(family: Family, path: str, layer: Mapping[str, Tensor]) -> list[dict[str, Tensor] | None]:
    """Return a layer as diffusers has it: in one or in three parts. None: there is nothing for this part."""
    down_RI, up_OR = layer[DOWN], layer[UP]
    scale = layer[ALPHA].item() / len(down_RI)
    if scale != 1:
        up_OR = (up_OR.float() * scale).to(up_OR.dtype)
    if len(family.diffusers_names(path)) == 1:
        widths: tuple[int, ...] = (len(up_OR),)
        pairs: list[tuple[Tensor, Tensor]] = [(down_RI, up_OR)]
    else:
        widths = qkv_widths(down_RI.shape[1], len(up_OR))
        pairs = _apart(down_RI, up_OR.split(widths))
    parts = [{_A: down, _B: up} if len(down) else None for down, up in pairs]
    if DORA in layer:
        for part, lengths in zip(parts, layer[DORA].flatten().split(widths), strict=True):
            if part is not None:
                part[MAGNITUDE] = lengths
    return parts


def _apart(down_RI: Tensor, ups: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """Return the LoRAs of q, k and v: each with its own ranks if no two need the same, else with all."""
    used_PR = torch.stack([(up != 0).any(0) for up in ups])
    if not (used_PR.sum(0) == 1).all():
        return [(down_RI, up) for up in ups]
    return [(down_RI[used], up[:, used]) for up, used in zip(ups, used_PR, strict=True)]


def _settings(ranks: Mapping[str, int], *, dora: bool) -> dict[str, object]:
    """Return what LoraConfig must say: alpha is the rank everywhere."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{name}": other for name, other in ranks.items() if other != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "use_dora": dora,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }
