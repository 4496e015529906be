"""Networks made from files, for any family of models. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.core.errors import CheckpointError
from library.core.suggest import did_you_mean, shorten
from networks.families.known import check_family, family_of
from networks.files import LoRAFile, LycorisFile, inspect_lora
from networks.names import ALPHA, DIT, TEXT_ENCODER, kohya_name

if TYPE_CHECKING:
    from torch import nn

    from networks.lora import LoRANetwork, LoRASize


def create_network_from_file(model: nn.Module, path: Path, multiplier: float = 1.0) -> LoRANetwork:
    """Make the part of a network file that is for the DiT, with its ranks and alphas; not applied yet.

    `create_text_network_from_file` makes the other part.

    Raises:
        CheckpointError: the file is not for this model's layers, or is damaged.
    """
    from networks.layer import linear_layers  # here, because it imports torch

    file, layers = inspect_lora(path), linear_layers(model)
    return _create(model, file, dit_paths(file, layers), DIT, multiplier)


def text_model(encoder: nn.Module) -> nn.Module:
    """Return the part of a text encoder (`Gemma2Encoder`) whose layers can have networks."""
    return encoder.model


def create_text_network_from_file(model: nn.Module, path: Path, multiplier: float = 1.0) -> LoRANetwork:
    """Make the part of a network file that is for what `text_model` returns; not applied yet.

    Raises:
        CheckpointError: the file is not for this encoder, or is damaged.
    """
    from networks.layer import linear_layers  # here, because it imports torch

    file = inspect_lora(path)
    return _create(model, file, text_paths(file, linear_layers(model)), TEXT_ENCODER, multiplier)


def dit_paths(file: LoRAFile, layers: Iterable[str]) -> dict[str, str]:
    """Return the paths of the DiT's layers that a file has something for, by name in the file.

    Raises:
        CheckpointError: the model lacks some of them, or the file has a part that its family cannot use.
    """
    names = [name for name in file.ranks if not name.startswith(f"{TEXT_ENCODER}_")]
    known = {kohya_name(layer): layer for layer in layers}
    check_family(file.path, names, known.values())
    unknown = [name for name in names if name not in known]
    if unknown:
        base = file.metadata.get("ss_base_model_version") or file.metadata.get("modelspec.architecture")
        made_for = f" Its metadata says it was made for '{base}'." if base else ""
        raise CheckpointError(
            f"{file.path} has LoRAs for {len(unknown)} layers that this model lacks: {shorten(unknown)}"
            f"{did_you_mean(unknown[0], known) or '.'}{made_for}"
        )
    family = family_of(known.values())
    if family is not None and family.no_text_encoder is not None and file.has_text_encoder:
        raise CheckpointError(f"{file.path} has a part for a text encoder, but {family.no_text_encoder}.")
    return {name: known[name] for name in names}


def text_paths(file: LoRAFile, layers: Iterable[str]) -> dict[str, str]:
    """Return the paths of a text encoder's layers that a file has something for, by name in the file.

    Raises:
        CheckpointError: the encoder lacks some of them.
    """
    layers = list(layers)
    known = {kohya_name(path, TEXT_ENCODER): path for path in layers}
    names = [name for name in file.ranks if name.startswith(f"{TEXT_ENCODER}_")]
    names = [name for name in names if not name.startswith(last_layer(layers))]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise CheckpointError(
            f"{file.path} has LoRAs for {len(unknown)} layers that this text encoder lacks: "
            f"{shorten(unknown)}{did_you_mean(unknown[0], known) or '.'}"
        )
    return {name: known[name] for name in names}


def last_layer(layers: Iterable[str]) -> str:
    """Return what the names of LoRAs for Gemma2's last layer begin with.

    It has no part in the features and is not built; other tools save LoRAs for it too, which are left out.
    """
    return f"{TEXT_ENCODER}_layers_{len({path.split('.')[1] for path in layers})}_"


def sizes_in_file(file: LoRAFile, paths: Mapping[str, str], lr: float | None = None) -> dict[str, LoRASize]:
    """Return the LoRAs that a file has for the layers at `paths`, which are by name in it."""
    from networks.lora import LoRASize  # here, because it imports torch

    state = file.read(paths)
    return {
        path: LoRASize(file.ranks[name], state[name + ALPHA].item(), lr, dora=file.doras.get(name))
        for name, path in paths.items()
    }


def _create(
    model: nn.Module, file: LoRAFile, paths: Mapping[str, str], prefix: str, multiplier: float
) -> LoRANetwork:
    """Make the network of a file for the layers at `paths`, with the file's weights."""
    from networks.lora import LoRANetwork  # here, because it imports torch
    from networks.lycoris.network import LycorisNetwork, sizes_of_file

    if isinstance(file, LycorisFile):
        network = LycorisNetwork(model, sizes_of_file(model, file, paths), prefix=prefix)
    else:
        network = LoRANetwork(model, sizes_in_file(file, paths), prefix=prefix)
    network.load_state(file.read(paths), str(file.path))
    network.multiplier = multiplier
    return network
