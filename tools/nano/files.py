"""Writing nano checkpoints: one file or shards with an index, names with prefixes, other dtypes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save
from torch import Tensor

from library.core.files import write_bytes, write_text

Tensors = Mapping[str, Tensor]


def write_shards(folder: Path, stem: str, tensors: Tensors, count: int) -> None:
    """Write `folder/stem.safetensors`, or so many shards of it with their index."""
    if count == 1:
        write_file(folder / f"{stem}.safetensors", tensors)
        return
    names, weight_map = sorted(tensors), {}
    for shard in range(count):
        file = f"{stem}-{shard + 1:05d}-of-{count:05d}.safetensors"
        part = names[shard::count]  # neighbours part company, so a loader that reads one shard is found out
        write_file(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_file(file: Path, tensors: Tensors, metadata: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write one file of tensors."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_bytes(file, save(contiguous, {"format": "pt", **metadata}))


def write_json(file: Path, content: dict[str, object]) -> None:
    """Write a JSON file as people read it."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def prefixed(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """Return the tensors with `prefix` before their names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def cast(tensors: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors in another dtype."""
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def bytes_tensor(content: bytes) -> Tensor:
    """Return bytes as a tensor, as a file is kept inside a checkpoint."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
