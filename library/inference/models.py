"""The models of an inference script with the LoRAs on them: loaded when they are first used, on a shelf."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.nn.swap.block_swap import BlockSwap
from library.nn.weights.shelf import Shelf
from library.options.inference import LoraWeight
from networks.files import inspect_lora
from networks.from_file import create_network_from_file, create_text_network_from_file, text_model
from networks.lora import LoRANetwork, merge

if TYPE_CHECKING:
    from library.inference.script import InferenceScript

MakeNetwork = Callable[[nn.Module, Path, float], LoRANetwork]


@dataclass(frozen=True)
class _Dressed:
    """A model, the LoRAs that are applied to it, and what brings the weights of its swapped blocks."""

    model: nn.Module
    networks: Sequence[LoRANetwork] = ()
    ring: BlockSwap | None = None

    def to(self, device: torch.device) -> None:
        """Move everything but the weights of swapped blocks, which wait where they are."""
        for network in self.networks:
            network.to(device)
        if self.ring is None:
            self.model.to(device)
        else:
            self.ring.move_others(self.model, device)


class Models:
    """Text encoder, transformer and autoencoder by name; with --offload only one is on the device."""

    def __init__(self, script: InferenceScript, device: torch.device) -> None:
        self._script, self._device = script, device
        self._loras = script.options.loras
        loaders = {
            "text": self._load_text_encoder,
            "transformer": self._load_transformer,
            "vae": lambda: _Dressed(script.load_vae(device)),
        }
        self._shelf = Shelf(loaders, device, offload=script.options.where.offload)
        # Which of the LoRAs change the text encoder too, and how strongly they do at the moment.
        weights = self._loras.lora_weights
        self._for_text = [n for n, lora in enumerate(weights) if inspect_lora(lora.path).has_text_encoder]
        self._text_multipliers = self._of_text(self._loras.multipliers)

    @property
    def device(self) -> torch.device:
        """Where models are while they are used."""
        return self._device

    @property
    def text_encoder(self) -> nn.Module:
        """What `load_text_encoder` loaded."""
        return self._shelf.use("text").model

    @property
    def transformer(self) -> nn.Module:
        """What `load_transformer` loaded."""
        return self._shelf.use("transformer").model

    @property
    def vae(self) -> nn.Module:
        """What `load_vae` loaded."""
        return self._shelf.use("vae").model

    @property
    def has_text_loras(self) -> bool:
        """Whether LoRAs change what the text encoder says."""
        return bool(self._for_text)

    def weigh_text(self, multipliers: Sequence[float]) -> bool:
        """Set the strength of LoRAs on the text encoder; return whether it was another one until now."""
        wanted = self._of_text(multipliers)
        if self._loras.merge_lora_weights or wanted == self._text_multipliers:
            return False
        _weigh(self._shelf.use("text").networks, wanted)
        self._text_multipliers = wanted
        return True

    def weigh(self, multipliers: Sequence[float]) -> None:
        """Set the strength of LoRAs on the transformer."""
        if not self._loras.merge_lora_weights:
            _weigh(self._shelf.use("transformer").networks, multipliers)

    def _of_text(self, multipliers: Sequence[float]) -> list[float]:
        return [multipliers[place] for place in self._for_text]

    def _load_text_encoder(self) -> _Dressed:
        encoder, weights = self._script.load_text_encoder(self._device), self._loras.lora_weights
        chosen = [weights[n] for n in self._for_text]
        if not chosen:
            return _Dressed(encoder)
        return _Dressed(encoder, self._dress(text_model(encoder), chosen, create_text_network_from_file))

    def _load_transformer(self) -> _Dressed:
        model = self._script.load_transformer(self._device)
        networks = self._dress(model, self._loras.lora_weights, create_network_from_file)
        return _Dressed(model, networks, model.runner.ring)

    def _dress(
        self, model: nn.Module, weights: Sequence[LoraWeight], make: MakeNetwork
    ) -> Sequence[LoRANetwork]:
        """Merge LoRAs into `model` or apply them to it; return those applied."""
        networks = [make(model, lora.path, lora.multiplier) for lora in weights]
        if self._loras.merge_lora_weights:
            merge(model, networks)
            return ()
        for network in networks:
            # They were made where the weights lie, which is not the device for those of swapped blocks.
            network.requires_grad_(False).to(self._device).apply_to(model)
        return networks


def _weigh(networks: Sequence[LoRANetwork], multipliers: Sequence[float]) -> None:
    for network, multiplier in zip(networks, multipliers, strict=True):
        network.multiplier = multiplier
