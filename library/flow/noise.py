"""The noise of a training picture, and its variants. Each number is a function of (seed, purpose, key).

    noise offset    noise + s * n_C: one number a channel; s may depend on the picture
    multires        noise + sum_i d^i * upscaled(n_i), divided by its standard deviation
    perturbation    the input has noise + g * n, while the target knows of noise only

Sources: https://www.crosslabs.org/blog/diffusion-with-offset-noise (offset),
https://wandb.ai/johnowhitaker/multires_noise (pyramid), https://arxiv.org/abs/2301.11706 (perturbation).

Shapes: C latent channels, h and w latent height and width; fp32. Numbers are drawn on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from library.core import seeds
from library.core.device import sent
from library.flow.path import draw_noise
from library.options.noise import NoiseOptions


def training_noise(
    options: NoiseOptions, shape: Sequence[int], mean_C: Tensor | None, seed: int, *key: int
) -> Tensor:
    """Return the noise (C, h, w) of one picture.

    Args:
        mean_C: mean of the picture's latents in each channel; read only with `adaptive_noise_scale`. Where
            it lies, the noise is put together, so that nobody waits for it.
        key: what the draw is for: (step, micro, slot).
    """
    device = torch.device("cpu") if mean_C is None else mean_C.device
    noise_Chw = sent(draw_noise(shape, seed, *key), device)
    if options.noise_offset is not None:
        noise_Chw = noise_Chw + _offset(options, shape, mean_C, seed, *key)
    if options.multires_noise_iterations:
        noise_Chw = _add_coarser(noise_Chw, options, seed, *key)
    return noise_Chw


def perturbation(options: NoiseOptions, shape: Sequence[int], seed: int, *key: int) -> Tensor:
    """Return what the model's input has in noise beyond what the target tells, (C, h, w)."""
    assert options.ip_noise_gamma is not None
    gamma = options.ip_noise_gamma
    if options.ip_noise_gamma_random_strength:
        gamma *= seeds.unit(seed, "perturbation strength", *key)
    return gamma * _normal(shape, seed, "perturbation", *key)


def _offset(
    options: NoiseOptions, shape: Sequence[int], mean_C: Tensor | None, seed: int, *key: int
) -> Tensor:
    assert options.noise_offset is not None
    strength = options.noise_offset
    if options.noise_offset_random_strength:
        strength *= seeds.unit(seed, "noise offset strength", *key)
    strength_C = torch.full((shape[0],), strength)
    drawn_C = _normal(shape[:1], seed, "noise offset", *key)
    if options.adaptive_noise_scale:
        assert mean_C is not None
        strength_C, drawn_C = (sent(tensor, mean_C.device) for tensor in (strength_C, drawn_C))
        strength_C = (strength_C + options.adaptive_noise_scale * mean_C.abs()).clamp_min(0)
    return (strength_C * drawn_C)[:, None, None]


def _add_coarser(noise_Chw: Tensor, options: NoiseOptions, seed: int, *key: int) -> Tensor:
    """Add noise of ever coarser grids, each 2 to 4 times coarser to the power of its number."""
    channels, height, width = noise_Chw.shape
    source = seeds.rng(seed, "coarser noise", *key)
    for number in range(options.multires_noise_iterations or 0):
        factor = (source.random() * 2 + 2) ** number
        grid = max(1, int(height / factor)), max(1, int(width / factor))
        drawn_1Chw = _normal((1, channels, *grid), seed, "coarser noise", number, *key)
        coarse_1Chw = sent(drawn_1Chw, noise_Chw.device)
        upscaled_Chw = F.interpolate(coarse_1Chw, (height, width), mode="bilinear")[0]
        noise_Chw = noise_Chw + options.multires_noise_discount**number * upscaled_Chw
        if 1 in grid:
            break
    return noise_Chw / noise_Chw.std()


def _normal(shape: Sequence[int], seed: int, *purpose: int | str) -> Tensor:
    return torch.randn(tuple(shape), generator=seeds.generator(seed, *purpose), dtype=torch.float32)
