"""The straight path from picture to noise, and the velocity along it: the house convention, written once.

    x_sigma = (1 - sigma) * x0 + sigma * noise        velocity = d x_sigma / d sigma = noise - x0

sigma runs from 0 (clean) to 1 (noise only). "timestep" is 1000 * sigma and is for display. A family whose
network counts time the other way translates in its own `velocity` and nowhere else.

Shapes: B batch, C latent channels, H and W latent height and width. All of it is fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from library.core import seeds


def mix(x0_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Return the noisy latents at sigma, in fp32."""
    sigma_B111 = sigma_B.float().view(-1, 1, 1, 1)
    return torch.lerp(x0_BCHW.float(), noise_BCHW.float(), sigma_B111)


def velocity_target(x0_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """Return what a perfect model predicts at every sigma, in fp32."""
    return noise_BCHW.float() - x0_BCHW.float()


def draw_noise(shape: Sequence[int], seed: int, *key: int) -> Tensor:
    """Return fp32 training noise on the CPU as a function of (seed, key); key is (step, micro, slot)."""
    return torch.randn(tuple(shape), generator=seeds.generator(seed, "noise", *key), dtype=torch.float32)


def initial_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Return the fp32 noise that a picture starts from.

    Drawn on the CPU, so that a seed means the same picture on every device. Other tools draw it the same way,
    which is why the seed is used as it is and not derived.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
