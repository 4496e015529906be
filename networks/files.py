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
from networks.file_layers import Layer, layers_in, to_kohya
from networks.lycoris import files as lycoris

if TYPE_CHECKING:
    from torch import Tensor

_FOREIGN_MARKS = {
    ".oft_": "an OFT network",
    ".lora_mid.": "a LoRA with convolutions",
}


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA file by its header: the rank of each layer by kohya name, and the metadata.

    Attributes:
        path: what the user named. tensors: the safetensors file there.
        layers: where the LoRA of each layer is, by kohya name.
    """

    path: Path
    ranks: Mapping[str, int]
    metadata: Mapping[str, str]
    tensors: Path
    layers: Mapping[str, Layer]

    @property
    def has_text_encoder(self) -> bool:
        """Whether a part of it is for the text encoder."""
        return any(name.startswith("lora_te") for name in self.ranks)

    @property
    def doras(self) -> dict[str, str]:
        """Of which features, "input" or "output", each layer has magnitudes that is a DoRA."""
        return {name: layer.dora for name, layer in self.layers.items() if layer.dora is not None}

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Load the tensors of these layers, or all, under kohya's names, on the CPU, each with an alpha."""
        from safetensors.torch import load_file  # here, because this module must be importable before torch

        wanted = self.layers if names is None else {name: self.layers[name] for name in names}
        return to_kohya(load_file(self.tensors), wanted)


@dataclass(frozen=True)
class LycorisFile(LoRAFile):
    """A file with networks of LyCORIS' other kinds. `ranks` has 0 for a kind without one."""

    layers: Mapping[str, lycoris.LycorisLayer]

    @property
    def doras(self) -> dict[str, str]:
        """Nothing: of such a file, `layers` says it."""
        return {}

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Load the tensors of these layers, or all, under kohya's names, on the CPU."""
        from safetensors.torch import load_file  # here, because this module must be importable before torch

        wanted = self.layers if names is None else {name: self.layers[name] for name in names}
        return lycoris.to_kohya(load_file(self.tensors), wanted)


def inspect_lora(path: Path) -> LoRAFile:
    """Read the header of a LoRA or DoRA with any tool's names: a file, or an adapter's folder. Torch-free.

    Returns:
        A `LycorisFile` if there are LyCORIS' other kinds in it.

    Raises:
        CheckpointError: the file is missing, truncated, not a LoRA, a network of another kind, or incomplete.
    """
    checkpoint = open_checkpoint(Path(path))
    if lycoris.is_lycoris(checkpoint.tensors):
        found = lycoris.lycoris_layers(checkpoint)
        ranks = {name: layer.rank for name, layer in found.items()}
        return LycorisFile(Path(path), ranks, checkpoint.metadata, checkpoint.files[0], found)
    for mark, what in _FOREIGN_MARKS.items():
        if any(mark in key for key in checkpoint.tensors):
            raise CheckpointError(f"{path} is {what}; only LoRAs and DoRAs can be read.")
    layers = layers_in(checkpoint)
    ranks = {name: layer.rank for name, layer in layers.items()}
    return LoRAFile(Path(path), ranks, checkpoint.metadata, checkpoint.files[0], layers)


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
