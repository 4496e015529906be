"""Sigma and noise of training pictures: functions of the draw they are for, so they can be made ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from library.data.batch import Batch
from library.flow import noise, timesteps
from library.options.train import TrainOptions
from library.training.family import FamilySpec


class Noising:
    """Draws what training adds to the latents of a batch. Everything is fp32, on the CPU."""

    def __init__(self, options: TrainOptions, family: FamilySpec, seed: int) -> None:
        self._timesteps, self._noise = options.timesteps, options.noise
        self._family = family
        self._seed = seed

    def add_to(self, batch: Batch) -> Batch:
        """Return the batch with its sigmas and noise; without noise if that has to wait for latents."""
        sigma_B = self.sigmas(batch)
        latents = self._like_latents(batch)
        waits = self._noise.adaptive_noise_scale and batch.latents is None
        return replace(
            batch,
            sigmas=tuple(sigma_B.tolist()),
            sigma_B=sigma_B,
            noise=None if waits else self.noise(batch, latents),
            perturbation=self._perturbation(batch, latents) if self._noise.ip_noise_gamma else None,
        )

    def noise(self, batch: Batch, latents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return noise like the latents of a batch; their values count with --adaptive_noise_scale only."""
        means: Sequence[Tensor | None] = [None] * len(latents)
        if self._noise.adaptive_noise_scale:
            means = [latent.float().mean((1, 2)) for latent in latents]
        return tuple(
            noise.training_noise(self._noise, latent.shape, mean_C, self._seed, d.step, d.micro, d.slot)
            for d, latent, mean_C in zip(batch.draws, latents, means, strict=True)
        )

    def sigmas(self, batch: Batch) -> Tensor:
        """Return the sigma at which each picture of a batch is trained, (B,)."""
        pixels_of_token = self._family.patch**2  # latent pixels
        drawn = [
            timesteps.draw_sigma(
                self._timesteps, latent[0].numel() // pixels_of_token, self._seed, d.step, d.micro, d.slot
            )
            for d, latent in zip(batch.draws, self._like_latents(batch), strict=True)
        ]
        return torch.tensor(drawn, dtype=torch.float32)

    def _like_latents(self, batch: Batch) -> Sequence[Tensor]:
        """Return the latents, or tensors of their shape without content for pixels yet to be encoded."""
        if batch.latents is not None:
            return batch.latents
        assert batch.pixels is not None
        channels, stride = self._family.latent_channels, self._family.latent_stride
        sizes = [(pixels.shape[1] // stride, pixels.shape[2] // stride) for pixels in batch.pixels]
        return [torch.empty(channels, *size, device="meta") for size in sizes]

    def _perturbation(self, batch: Batch, latents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            noise.perturbation(self._noise, latent.shape, self._seed, d.step, d.micro, d.slot)
            for d, latent in zip(batch.draws, latents, strict=True)
        )
