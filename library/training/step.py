"""From latents to losses: noise, sigma, velocity. Everything random is keyed by the draw it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.data.batch import Condition
from library.data.items import Draw
from library.flow import loss, path, timesteps
from library.options.loss import LossOptions
from library.options.timesteps import TimestepOptions

Velocity = Callable[[Tensor, Tensor, Sequence[Condition]], Tensor]


@dataclass(frozen=True)
class NoisyLatents:
    """Latents at a place on the path to noise, and the velocity that the model should predict there."""

    x_BCHW: Tensor
    target_BCHW: Tensor
    sigma_B: Tensor


def add_noise(latents_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor) -> NoisyLatents:
    """Mix noise into latents, in fp32 on the latents' device."""
    device = latents_BCHW.device
    noise, sigma = noise_BCHW.to(device, non_blocking=True), sigma_B.to(device, non_blocking=True)
    return NoisyLatents(
        path.mix(latents_BCHW, noise, sigma), path.velocity_target(latents_BCHW, noise), sigma
    )


def training_noise(latents_BCHW: Tensor, draws: Sequence[Draw], seed: int) -> Tensor:
    """Return fp32 noise like the latents, on the CPU; each row depends on its draw's place in the run
    alone."""
    shape = latents_BCHW.shape[1:]
    return torch.stack([path.draw_noise(shape, seed, d.step, d.micro, d.slot) for d in draws])


def training_sigmas(options: TimestepOptions, tokens: int, draws: Sequence[Draw], seed: int) -> Tensor:
    """Return each draw's sigma, fp32 (B,) on the CPU. `tokens`: image tokens of a picture of this batch."""
    sigmas = [timesteps.draw_sigma(options, tokens, seed, d.step, d.micro, d.slot) for d in draws]
    return torch.tensor(sigmas, dtype=torch.float32)


def velocity_losses(
    velocity: Velocity,
    noisy: NoisyLatents,
    conditions: Sequence[Condition],
    options: LossOptions,
    *,
    mask_B1HW: Tensor | None = None,
    weights_B: Tensor | None = None,
) -> Tensor:
    """Return the loss of each picture, fp32 (B,)."""
    predicted_BCHW = velocity(noisy.x_BCHW, noisy.sigma_B, conditions)
    return loss.velocity_loss(predicted_BCHW, noisy.target_BCHW, noisy.sigma_B, options, mask_B1HW, weights_B)
