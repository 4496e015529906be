"""LoRA files: what a file holds, told from its header, and files with the hashes that readers expect.

Importing this module does not import torch, so that a wrong file is named before that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from library.core.checkpoint_files import open_checkpoint
from library.core.errors import CheckpointError
from library.core.files import write_bytes
from library.core.suggest import shorten

if TYPE_CHECKING:
    from torch import Tensor

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"

_FOREIGN_MARKS = {
    ".lora_A.": "a LoRA with diffusers' (PEFT) names",
    ".lora_B.": "a LoRA with diffusers' (PEFT) names",
    ".lora.down.": "a LoRA with the names of early diffusers",
    ".lokr_": "a LyCORIS LoKr",
    ".hada_": "a LyCORIS LoHa",
    ".oft_": "an OFT network",
    ".dora_scale": "a DoRA",
    ".lora_mid.": "a LoRA with convolutions",
}


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA file by its header: the rank of each layer by kohya name, and the metadata."""

    path: Path
    ranks: Mapping[str, int]
    metadata: Mapping[str, str]

    def read(self) -> dict[str, Tensor]:
        """Load the tensors on the CPU, in the file's dtype; a missing alpha becomes the rank."""
        import torch  # here, because this module must be importable before torch
        from safetensors.torch import load_file

        tensors = load_file(self.path)
        for name, rank in self.ranks.items():
            tensors.setdefault(name + ALPHA, torch.tensor(float(rank)))
        return tensors


def inspect_lora(path: Path) -> LoRAFile:
    """Read the header of a LoRA file with kohya's names. Torch-free.

    Raises:
        CheckpointError: the file is missing, truncated, not a LoRA, a network of another kind, or incomplete.
    """
    checkpoint = open_checkpoint(Path(path))
    keys = checkpoint.tensors.keys()
    for mark, what in _FOREIGN_MARKS.items():
        if any(mark in key for key in keys):
            raise CheckpointError(
                f"{path} is {what}; only plain LoRAs with kohya's names (lora_unet_...{DOWN}) can be read."
            )
    downs = {key.removesuffix(DOWN) for key in keys if key.endswith(DOWN)}
    ups = {key.removesuffix(UP) for key in keys if key.endswith(UP)}
    if not downs and not ups:
        raise CheckpointError(f"{path} is not a LoRA: none of its keys ends in '{DOWN}'{_example(keys)}.")
    if downs != ups:
        raise CheckpointError(f"{path} is not complete: '{min(downs ^ ups)}' lacks its up or down weight.")
    known = {name + ending for name in downs for ending in (DOWN, UP, ALPHA)}
    if keys - known:
        raise CheckpointError(f"{path} has keys that are no part of a LoRA: {shorten(sorted(keys - known))}.")
    ranks = {name: checkpoint.shape(name + DOWN)[0] for name in sorted(downs)}
    return LoRAFile(Path(path), ranks, checkpoint.metadata)


def save_network(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a network as safetensors, atomically, with hashes of its content in the metadata.

    `sshs_model_hash` and `sshs_legacy_hash` are those of the "additional networks" extension, by which web
    UIs know a LoRA. They are taken from the file with only the `ss_` part of the metadata, so that editing
    the rest changes neither.

    Raises:
        StorageError: the file could not be written.
    """
    from safetensors.torch import save  # here, because this module must be importable before torch

    tensors = dict(state)
    plain = save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    model_hash = tensors_hash(plain)
    hashes = {
        "sshs_model_hash": model_hash,
        "sshs_legacy_hash": legacy_hash(BytesIO(plain)),
        "modelspec.hash_sha256": f"0x{model_hash}",
    }
    write_bytes(path, save(tensors, {**metadata, **hashes}))


def kohya_name(path: str, prefix: str = "lora_unet") -> str:
    """Return kohya's name of a layer: layers.0.attention.qkv -> lora_unet_layers_0_attention_qkv."""
    return f"{prefix}_{path.replace('.', '_')}"


def tensors_hash(content: bytes) -> str:
    """Return the SHA-256 of a safetensors file's content after its header."""
    header_length = int.from_bytes(content[:8], "little")
    return hashlib.sha256(memoryview(content)[8 + header_length :]).hexdigest()


def legacy_hash(handle: BinaryIO) -> str:
    """Return the first 8 digits of the SHA-256 of the first 64 KiB of a file's second MiB."""
    handle.seek(0x100000)
    return hashlib.sha256(handle.read(0x10000)).hexdigest()[:8]


def _example(keys: Iterable[str]) -> str:
    first = min(keys, default=None)
    return f" (the first is '{first}')" if first else " (it is empty)"
