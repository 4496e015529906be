"""From a batch to losses: what is not cached is encoded, noise is added, the model is asked.

Everything random is keyed by the draw it is for, so it depends on nothing that happened before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.data.batch import Batch, Condition
from library.data.items import Draw
from library.flow import loss, path, timesteps
from library.training.inputs import Inputs
from networks.lora import LoRANetwork

if TYPE_CHECKING:
    from library.training.trainer import NetworkTrainer


@dataclass(frozen=True)
class NoisyLatents:
    """Latents at a place on the path to noise, and the velocity that the model should predict there."""

    x_BCHW: Tensor
    target_BCHW: Tensor
    sigma_B: Tensor


class Objective:
    """The losses of a trainer's model with a network on it."""

    def __init__(
        self, trainer: NetworkTrainer, model: nn.Module, network: LoRANetwork, inputs: Inputs, *, seed: int
    ) -> None:
        self._trainer = trainer
        self._timesteps, self._loss = trainer.options.timesteps, trainer.options.loss
        self._model = model
        self._network = network
        self._inputs = inputs
        self._seed = seed

    def training_losses(self, batch: Batch) -> Tensor:
        """Return the weighted training loss of each picture of a batch, fp32 (B,)."""
        latents_BCHW, conditions = self._inputs.latents(batch), self._inputs.conditions(batch)
        tokens = latents_BCHW[0, 0].numel() // self._trainer.family.patch**2
        sigma_B = self._sigmas(batch.draws, tokens)
        noisy = add_noise(latents_BCHW, self._noise(batch.draws, latents_BCHW), sigma_B)
        noisy = self._preserve(batch, noisy, conditions)
        weights_B = batch.weights_B.to(latents_BCHW.device, non_blocking=True)
        weights_B = weights_B * loss.sigma_weight(self._timesteps.weighting_scheme, noisy.sigma_B)
        return self.losses_at(batch, noisy, conditions, weights_B)

    def losses_at(
        self,
        batch: Batch,
        noisy: NoisyLatents,
        conditions: Sequence[Condition],
        weights_B: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each picture at given noise, fp32 (B,)."""
        self._network.multiplier = batch.network_multiplier
        predicted_BCHW = self.velocity(noisy.x_BCHW, noisy.sigma_B, conditions)
        mask = batch.masks_B1HW
        mask = None if mask is None else mask.to(predicted_BCHW.device, non_blocking=True)
        return loss.velocity_loss(
            predicted_BCHW, noisy.target_BCHW, noisy.sigma_B, self._loss, mask, weights_B
        )

    def velocity(self, x_BCHW: Tensor, sigma_B: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Return the model's velocity in the house convention."""
        return self._trainer.velocity(self._model, x_BCHW, sigma_B, conditions)

    def _sigmas(self, draws: Sequence[Draw], tokens: int) -> Tensor:
        """Return each draw's sigma, fp32 (B,) on the CPU. `tokens`: image tokens of one picture."""
        drawn = [
            timesteps.draw_sigma(self._timesteps, tokens, self._seed, d.step, d.micro, d.slot) for d in draws
        ]
        return torch.tensor(drawn, dtype=torch.float32)

    def _noise(self, draws: Sequence[Draw], latents_BCHW: Tensor) -> Tensor:
        """Return fp32 noise like the latents, on the CPU."""
        shape = latents_BCHW.shape[1:]
        return torch.stack([path.draw_noise(shape, self._seed, d.step, d.micro, d.slot) for d in draws])

    def _preserve(self, batch: Batch, noisy: NoisyLatents, conditions: Sequence[Condition]) -> NoisyLatents:
        """Where a subset says diff_output_preservation, make the untrained model's own output the target."""
        if not any(batch.preserved):
            return noisy
        self._network.enabled = False
        with torch.no_grad():
            base_BCHW = self.velocity(noisy.x_BCHW, noisy.sigma_B, conditions)
        self._network.enabled = True
        preserved_B = torch.tensor(batch.preserved).to(base_BCHW.device, non_blocking=True)
        return replace(
            noisy, target_BCHW=torch.where(preserved_B[:, None, None, None], base_BCHW, noisy.target_BCHW)
        )


def add_noise(latents_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor) -> NoisyLatents:
    """Mix noise into latents, in fp32 on the latents' device."""
    device = latents_BCHW.device
    noise, sigma = noise_BCHW.to(device, non_blocking=True), sigma_B.to(device, non_blocking=True)
    return NoisyLatents(
        path.mix(latents_BCHW, noise, sigma), path.velocity_target(latents_BCHW, noise), sigma
    )
