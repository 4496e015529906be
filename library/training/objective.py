"""From a batch to losses: what is not cached is encoded, noise is added, the model is asked.

Everything random is keyed by the draw it is for, so it depends on nothing that happened before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.data.batch import Batch, Condition
from library.data.items import Draw
from library.flow import loss, noise, path, timesteps
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
        self,
        trainer: NetworkTrainer,
        model: nn.Module,
        network: LoRANetwork,
        inputs: Inputs,
        *,
        seed: int,
        on_losses: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        """`on_losses` is called with sigma_B (on the CPU) and losses_B of every training batch."""
        self._trainer = trainer
        self._timesteps, self._loss = trainer.options.timesteps, trainer.options.loss
        self._noise_options = trainer.options.noise
        self._model = model
        self._network = network
        self._inputs = inputs
        self._seed = seed
        self._on_losses = on_losses

    def training_losses(self, batch: Batch) -> Tensor:
        """Return the weighted training loss of each picture of a batch, fp32 (B,)."""
        latents_BCHW, conditions = self._inputs.latents(batch), self.conditions(batch)
        sigma_B = self.sigmas(batch)
        noisy = add_noise(latents_BCHW, self._noise(batch.draws, latents_BCHW), sigma_B)
        noisy = self._perturb(batch.draws, noisy)
        noisy = self._preserve(batch, noisy, conditions)
        weights_B = batch.weights_B.to(latents_BCHW.device, non_blocking=True)
        weights_B = weights_B * loss.sigma_weight(self._timesteps.weighting_scheme, noisy.sigma_B)
        losses_B = self.losses_at(batch, noisy, conditions, weights_B)
        if self._on_losses is not None:
            self._on_losses(sigma_B, losses_B)
        return losses_B

    def conditions(self, batch: Batch) -> list[Condition]:
        """Return a batch's conditions, as the network makes them if it is on the text encoder too."""
        self._network.multiplier = batch.network_multiplier
        return self._inputs.conditions(batch)

    def sigmas(self, batch: Batch) -> Tensor:
        """Return the sigma at which each picture of a batch is trained, fp32 (B,) on the CPU."""
        family = self._trainer.family
        if batch.latents_BCHW is not None:
            tokens = batch.latents_BCHW[0, 0].numel() // family.patch**2
        else:
            tokens = batch.pixels_BCHW[0, 0].numel() // family.pixel_stride**2
        drawn = [
            timesteps.draw_sigma(self._timesteps, tokens, self._seed, d.step, d.micro, d.slot)
            for d in batch.draws
        ]
        return torch.tensor(drawn, dtype=torch.float32)

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

    def _noise(self, draws: Sequence[Draw], latents_BCHW: Tensor) -> Tensor:
        """Return fp32 noise like the latents, on the CPU."""
        options, shape = self._noise_options, latents_BCHW.shape[1:]
        means = [None] * len(draws)
        if options.adaptive_noise_scale:
            means = latents_BCHW.float().mean((2, 3)).cpu()
        return torch.stack(
            [
                noise.training_noise(options, shape, mean_C, self._seed, d.step, d.micro, d.slot)
                for d, mean_C in zip(draws, means, strict=True)
            ]
        )

    def _perturb(self, draws: Sequence[Draw], noisy: NoisyLatents) -> NoisyLatents:
        """Mix noise into the input that the target does not know of, where --ip_noise_gamma asks for it."""
        if not self._noise_options.ip_noise_gamma:
            return noisy
        shape, device = noisy.x_BCHW.shape[1:], noisy.x_BCHW.device
        extra = [
            noise.perturbation(self._noise_options, shape, self._seed, d.step, d.micro, d.slot) for d in draws
        ]
        extra_BCHW = torch.stack(extra).to(device, non_blocking=True)
        return replace(noisy, x_BCHW=noisy.x_BCHW + noisy.sigma_B[:, None, None, None] * extra_BCHW)

    def _preserve(self, batch: Batch, noisy: NoisyLatents, conditions: Sequence[Condition]) -> NoisyLatents:
        """Where a subset says diff_output_preservation, make the untrained model's own output the target."""
        if not any(batch.preserved):
            return noisy
        self._network.enabled = False
        with torch.no_grad():
            if self._trainer.options.network.trains_text_encoder:
                conditions = self._inputs.conditions(batch)
            base_BCHW = self.velocity(noisy.x_BCHW, noisy.sigma_B, conditions)
        self._network.enabled = True
        preserved_B = torch.tensor(batch.preserved).to(base_BCHW.device, non_blocking=True)
        return replace(
            noisy, target_BCHW=torch.where(preserved_B[:, None, None, None], base_BCHW, noisy.target_BCHW)
        )


def add_noise(latents_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor) -> NoisyLatents:
    """Mix noise into latents, in fp32 on the latents' device."""
    device = latents_BCHW.device
    noise_BCHW, sigma_B = noise_BCHW.to(device, non_blocking=True), sigma_B.to(device, non_blocking=True)
    x_BCHW = path.mix(latents_BCHW, noise_BCHW, sigma_B)
    return NoisyLatents(x_BCHW, path.velocity_target(latents_BCHW, noise_BCHW), sigma_B)
