"""Sigma, noise and dropped tokens of training pictures: functions of the draw they are for, so they can be
made ahead.

Pictures of a batch may differ in size: latents, noise and velocities are sequences, (C, h, w) a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from library.data.batch import Batch
from library.data.items import Draw, Size
from library.flow import loss, noise, path, rollout, timesteps
from library.nn.running.routing import Routing
from library.options.train import TrainOptions
from library.training.family import FamilySpec
from library.training.routing import Router


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

    def __init__(
        self, options: TrainOptions, family: FamilySpec, seed: int, router: Router | None = None
    ) -> None:
        """`router`: where tokens of pictures skip blocks."""
        self._router = router
        self._timesteps, self._noise, self._rollout = options.timesteps, options.noise, options.rollout
        self._family = family
        self._seed = seed

    def add_to(self, batch: Batch) -> Batch:
        """Return the batch with its sigmas and what hangs on them: loss weights, walks, noisy latents; and
        with the tokens that it is trained on, if some are dropped.

        Latents that are yet to be made get their noise later, see `noisy`.
        """
        sigma_B = self.sigmas(batch)
        weights_B = batch.weights_B * loss.sigma_weight(self._timesteps.weighting_scheme, sigma_B)
        batch = replace(batch, sigmas=tuple(sigma_B.tolist()), sigma_B=sigma_B, weights_B=weights_B)
        if self._rollout.on:
            batch = replace(batch, walks=self.walks(batch.draws, sigma_B, batch.preserved))
        latents = self._like_latents(batch)
        if self._router is not None:
            batch = replace(batch, kept=self._router.kept(batch, latents))
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

    def routing(self, batch: Batch) -> Routing | None:
        """Return which tokens of a batch of `add_to` skip blocks; None if all take part in all."""
        return None if self._router is None else self._router.routing(batch)

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
        tokens = [latent[0].numel() // pixels_of_token for latent in self._like_latents(batch)]
        return self._drawn_sigmas(batch.draws, tokens)

    def walks(
        self, draws: Sequence[Draw], sigma_B: Tensor, preserved: Sequence[bool]
    ) -> tuple[tuple[float, ...], ...]:
        """Return the walk of each draw that is trained at such a sigma; see `library.training.rollout`.

        Pictures that train towards the untrained model never have one: it has no drift to be cured of.
        """
        options = self._rollout
        offsets = [
            0 if keeps else rollout.draw_offset(options, self._seed, d.step, d.micro, d.slot)
            for d, keeps in zip(draws, preserved, strict=True)
        ]
        return tuple(
            rollout.walk(sigma, offset, options.scheduled_sampling_step_size)
            for sigma, offset in zip(sigma_B.tolist(), offsets, strict=True)
        )

    def walks_of_others(
        self, draws: Sequence[Draw], sizes: Sequence[Size], preserved: Sequence[bool]
    ) -> tuple[tuple[float, ...], ...]:
        """Return the walks of draws whose pictures, of such sizes in pixels, need not be here."""
        tokens = [self._family.image_tokens(size) for size in sizes]
        return self.walks(draws, self._drawn_sigmas(draws, tokens), preserved)

    def _drawn_sigmas(self, draws: Sequence[Draw], tokens: Sequence[int]) -> Tensor:
        """Return the sigma of each draw, of a picture with so many tokens, fp32 (B,)."""
        drawn = [
            timesteps.draw_sigma(self._timesteps, count, self._seed, d.step, d.micro, d.slot)
            for d, count in zip(draws, tokens, strict=True)
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
