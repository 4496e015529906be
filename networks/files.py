"""LoRA files: what a file holds, told from its header, and files with the hashes that readers expect.

Importing this module does not import torch, so that a wrong file is named before that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from library.core.checkpoint_files import open_checkpoint
from library.core.errors import CheckpointError
from library.core.files import write_bytes
from library.core.suggest import shorten
from networks.names import ALPHA, DOWN, UP
from networks.peft_names import PeftLayer, peft_layers, rank_of, to_kohya

if TYPE_CHECKING:
    from torch import Tensor

_FOREIGN_MARKS = {
    ".lora.down.": "a LoRA with the names of early diffusers",
    ".lokr_": "a LyCORIS LoKr",
    ".hada_": "a LyCORIS LoHa",
    ".oft_": "an OFT network",
    ".dora_scale": "a DoRA",
    ".lora_magnitude_vector": "a DoRA",
    ".lora_mid.": "a LoRA with convolutions",
}


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA file by its header: the rank of each layer by kohya name, and the metadata.

    Attributes:
        path: what the user named. tensors: the safetensors file there.
        peft_layers: where the LoRA of each layer is in a file with PEFT's names; empty for kohya's names.
    """

    path: Path
    ranks: Mapping[str, int]
    metadata: Mapping[str, str]
    tensors: Path
    peft_layers: Mapping[str, PeftLayer] = field(default_factory=dict)

    @property
    def has_text_encoder(self) -> bool:
        """Whether a part of it is for the text encoder."""
        return any(name.startswith("lora_te") for name in self.ranks)

    def read(self) -> dict[str, Tensor]:
        """Load the tensors under kohya's names, on the CPU; a missing alpha becomes the rank."""
        import torch  # here, because this module must be importable before torch
        from safetensors.torch import load_file

        tensors = load_file(self.tensors)
        if self.peft_layers:
            return to_kohya(tensors, self.peft_layers)
        for name, rank in self.ranks.items():
            tensors.setdefault(name + ALPHA, torch.tensor(float(rank)))
        return tensors


def inspect_lora(path: Path) -> LoRAFile:
    """Read the header of a LoRA with kohya's or PEFT's names: a file, or an adapter's folder. Torch-free.

    Raises:
        CheckpointError: the file is missing, truncated, not a LoRA, a network of another kind, or incomplete.
    """
    checkpoint = open_checkpoint(Path(path))
    keys = checkpoint.tensors.keys()
    for mark, what in _FOREIGN_MARKS.items():
        if any(mark in key for key in keys):
            raise CheckpointError(
                f"{path} is {what}; only plain LoRAs with the names of kohya (lora_unet_...{DOWN}) or PEFT "
                f"(transformer...lora_A.weight) can be read."
            )
    layers = peft_layers(checkpoint)
    if layers:
        ranks = {name: rank_of(layer) for name, layer in sorted(layers.items())}
        return LoRAFile(Path(path), ranks, checkpoint.metadata, checkpoint.files[0], layers)
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
    return LoRAFile(Path(path), ranks, checkpoint.metadata, checkpoint.files[0])


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
