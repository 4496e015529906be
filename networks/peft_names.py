"""LoRAs with the names of PEFT, as diffusers, ai-toolkit and others write them, read as kohya's. Torch-free.

    transformer.layers.0.attn.to_q.lora_A.weight           diffusers: its own layers, q, k and v apart
    diffusion_model.layers.0.attention.qkv.lora_A.weight   the original layers
    base_model.model.layers.0...                           PEFT's own adapter files

Notable facts:
- The strength alpha / rank comes from `.alpha` tensors, else from the adapter's settings (in the metadata, as
  diffusers writes them, or in adapter_config.json), else it is 1, as diffusers takes it.
- LoRAs of q, k and v become one of the fused layer: `down` one below the other, `up` block-diagonal.

Shape legend: see `networks/layer.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.core.checkpoint_files import Checkpoint
from library.core.errors import CheckpointError
from networks.names import ALPHA, DOWN, UP, kohya_name

if TYPE_CHECKING:
    from torch import Tensor

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B|down|up)(\.(?!weight)[^.]+)?\.weight")
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
_TEXT_ENCODER = "text_encoder."
# From the names of diffusers.Lumina2Transformer2DModel to the original ones.
_DIFFUSERS_NAMES = (
    (r"time_caption_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_caption_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_caption_embed\.caption_embedder\.", "cap_embedder."),
    (r"norm_out\.linear_1", "final_layer.adaLN_modulation.1"),
    (r"norm_out\.linear_2", "final_layer.linear"),
    (r"\.attn\.to_out\.0$", ".attention.out"),
    (r"\.attn\.to_([qkv])$", r".attention.\1"),
    (r"\.feed_forward\.linear_([123])$", r".feed_forward.w\1"),
    (r"\.norm1\.linear$", ".adaLN_modulation.1"),
)
_QKV_PART = re.compile(r"(.*\.attention)\.([qkv])")


@dataclass(frozen=True)
class Part:
    """The LoRA of one layer in the file. `alpha` holds unless the file has it as a tensor, `alpha_key`."""

    down: str
    up: str
    rank: int
    alpha: float
    alpha_key: str | None


PeftLayer = tuple[Part | None, ...]  # one part, or those of q, k and v


def peft_layers(checkpoint: Checkpoint) -> dict[str, PeftLayer]:
    """Return the LoRAs of a file with PEFT's names by kohya name; nothing if it has other names.

    Raises:
        CheckpointError: it has such names, but is not complete, or holds more than plain LoRAs.
    """
    found: dict[str, dict[str, str]] = {}
    for key in checkpoint.tensors:
        match = _KEY.fullmatch(key)
        if match and (match["side"] in "AB" or "." in match["module"]):  # kohya's names have no dots
            side = "down" if match["side"] in ("A", "down") else "up"
            found.setdefault(match["module"], {})[side] = key
    if not found:
        return {}
    settings = _settings(checkpoint)
    layers: dict[str, list[Part | None]] = {}
    for module, keys in found.items():
        if len(keys) != 2:
            raise CheckpointError(f"{checkpoint.path} is not complete: '{module}' lacks its A or B weight.")
        rank = checkpoint.shape(keys["down"])[0]
        alpha_key = f"{module}.alpha" if f"{module}.alpha" in checkpoint.tensors else None
        part = Part(keys["down"], keys["up"], rank, settings.alpha(_stripped(module), rank), alpha_key)
        name, place = _place(module)
        parts = layers.setdefault(name, [None] * (1 if place is None else 3))
        if parts[place or 0] is not None or (place is None) != (len(parts) == 1):
            raise CheckpointError(f"{checkpoint.path} has more than one LoRA for the layer of '{module}'.")
        parts[place or 0] = part
    _check(checkpoint, layers.values())
    return {name: tuple(parts) for name, parts in layers.items()}


def rank_of(layer: PeftLayer) -> int:
    """Return the rank of the LoRA that a layer becomes."""
    return sum(part.rank for part in layer if part)


def to_kohya(tensors: Mapping[str, Tensor], layers: Mapping[str, PeftLayer]) -> dict[str, Tensor]:
    """Return the tensors of a file with PEFT's names under kohya's names."""
    import torch  # here, because this module must be importable before torch

    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        parts = [part for part in layer if part]
        scales = [(tensors[p.alpha_key].item() if p.alpha_key else p.alpha) / p.rank for p in parts]
        downs, ups = [tensors[p.down] for p in parts], [tensors[p.up] for p in parts]
        if len(set(scales)) > 1:  # one alpha for all: what differs goes into the weights
            ups = [up.float() * scale for up, scale in zip(ups, scales, strict=True)]
            scales = [1.0]
        if len(layer) == 3:
            empty = ups[-1].new_zeros(len(ups[-1]), 0)  # a part without a LoRA: rows, but no columns
            filled = iter(ups)
            ups = [empty if part is None else next(filled) for part in layer]
        state[name + DOWN] = torch.cat(downs)
        state[name + UP] = torch.block_diag(*ups) if len(ups) > 1 else ups[0]
        state[name + ALPHA] = torch.tensor(scales[0] * rank_of(layer))
    return state


def _place(module: str) -> tuple[str, int | None]:
    """Return the kohya name of a module's layer, and which part of a fused one it is: q, k, v as 0, 1, 2."""
    path = module
    for prefix in _PREFIXES:
        path = path.removeprefix(prefix)
    if path.startswith(_TEXT_ENCODER):
        return kohya_name(path.removeprefix(_TEXT_ENCODER).removeprefix("model."), "lora_te"), None
    for pattern, replacement in _DIFFUSERS_NAMES:
        path = re.sub(pattern, replacement, path)
    part = _QKV_PART.fullmatch(path)
    return (kohya_name(path), None) if part is None else (kohya_name(part[1] + ".qkv"), "qkv".index(part[2]))


def _stripped(module: str) -> str:
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    return module


def _check(checkpoint: Checkpoint, layers: Iterable[list[Part | None]]) -> None:
    """Raise CheckpointError for tensors that are no part of a plain LoRA, and for q alone."""
    known = set()
    for parts in layers:
        known |= {key for part in parts if part for key in (part.down, part.up, part.alpha_key)}
        if len(parts) == 3 and (parts[0] is None or parts[1:] == [None, None]):
            key = next(part.down for part in parts if part)
            raise CheckpointError(
                f"{checkpoint.path}: beside '{key}' there must be LoRAs for the query and for the key or "
                f"value of the same layer; without them the sizes of the fused layer cannot be told."
            )
    unknown = sorted(checkpoint.tensors.keys() - known)
    if unknown:
        raise CheckpointError(
            f"{checkpoint.path} has {len(unknown)} tensors that are no part of a plain LoRA, such as "
            f"'{unknown[0]}'."
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


def _settings(checkpoint: Checkpoint) -> _Settings:
    """Read the adapter's settings from the metadata or from adapter_config.json beside the file."""
    beside = checkpoint.files[0].with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" in checkpoint.metadata:
            stored = json.loads(checkpoint.metadata["lora_adapter_metadata"])
            found = {key.removeprefix("transformer."): value for key, value in stored.items()}
        elif beside.is_file() and checkpoint.files[0].name.startswith("adapter_model"):
            found = json.loads(Path(beside).read_text(encoding="utf-8"))
        else:
            return _Settings()
        alphas = {str(pattern): float(value) for pattern, value in (found.get("alpha_pattern") or {}).items()}
        return _Settings(float(found["lora_alpha"]), alphas, bool(found.get("use_rslora")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: the adapter's settings cannot be read ({type(error).__name__}: {error})."
        ) from None
