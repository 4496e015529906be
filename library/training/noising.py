"""Sigma and noise of training pictures: functions of the draw they are for, so they can be made ahead.

Pictures of a batch may differ in size: latents, noise and velocities are sequences, (C, h, w) a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from library.data.batch import Batch
from library.flow import loss, noise, path, timesteps
from library.options.train import TrainOptions
from library.training.family import FamilySpec


@dataclass(frozen=True)
class NoisyLatents:
    """Latents at a place on the path to noise, and the velocity that the model should predict there.

    `x` and `target` are (C, h, w) a picture, fp32.
    """

    x: Sequence[Tensor]
    target: Sequence[Tensor]
    sigma_B: Tensor


def add_noise(latents: Sequence[Tensor], noise: Sequence[Tensor], sigma_B: Tensor) -> NoisyLatents:
    """Mix noise into latents, in fp32 on the latents' device."""
    device = latents[0].device
    sigma_B = sigma_B.to(device, non_blocking=True)
    x, target = [], []
    for latent, one, sigma in zip(latents, noise, sigma_B.split(1), strict=True):
        one = one.to(device, non_blocking=True)
        x.append(path.mix(latent, one, sigma).squeeze(0))
        target.append(path.velocity_target(latent, one))
    return NoisyLatents(x, target, sigma_B)


def perturbed(noisy: NoisyLatents, perturbation: Sequence[Tensor] | None) -> NoisyLatents:
    """Mix noise into the input that the target does not know of, where --ip_noise_gamma asks for it."""
    if perturbation is None:
        return noisy
    extra = [each.to(noisy.sigma_B.device, non_blocking=True) for each in perturbation]
    triples = zip(noisy.x, extra, noisy.sigma_B, strict=True)
    return replace(noisy, x=[x + sigma * more for x, more, sigma in triples])


class Noising:
    """Draws what training adds to the latents of a batch. Everything is fp32, on the CPU."""

    def __init__(self, options: TrainOptions, family: FamilySpec, seed: int) -> None:
        self._timesteps, self._noise = options.timesteps, options.noise
        self._family = family
        self._seed = seed

    def add_to(self, batch: Batch) -> Batch:
        """Return the batch with its sigmas and what hangs on them: weights of losses, and noisy latents.

        Latents that are yet to be made get their noise later, see `noisy`.
        """
        sigma_B = self.sigmas(batch)
        weights_B = batch.weights_B * loss.sigma_weight(self._timesteps.weighting_scheme, sigma_B)
        batch = replace(batch, sigmas=tuple(sigma_B.tolist()), sigma_B=sigma_B, weights_B=weights_B)
        latents = self._like_latents(batch)
        perturbation = self._perturbation(batch, latents) if self._noise.ip_noise_gamma else None
        if batch.latents is not None:
            noisy = perturbed(add_noise(latents, self.noise(batch, latents), sigma_B), perturbation)
            return replace(batch, noisy=tuple(noisy.x), targets=tuple(noisy.target))
        waits = bool(self._noise.adaptive_noise_scale)
        noise = None if waits else self.noise(batch, latents)
        return replace(batch, noise=noise, perturbation=perturbation)

    def noisy(self, batch: Batch, latents: Sequence[Tensor]) -> NoisyLatents:
        """Return the latents of a batch of `add_to` with their noise, made now."""
        assert batch.sigma_B is not None
        noise = self.noise(batch, latents) if batch.noise is None else batch.noise
        return perturbed(add_noise(latents, noise, batch.sigma_B), batch.perturbation)

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
