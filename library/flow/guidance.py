"""Classifier-free guidance as Lumina uses it: only in the noisy part of the way, and with a bounded norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from library.flow.solver import VelocityAt
from library.options.request import ImageRequest

Condition = TypeVar("Condition")
# (x_BCHW, sigma_B, conditions) -> velocity_BCHW
Velocity = Callable[[Tensor, Tensor, Sequence[Condition]], Tensor]


def guided(
    velocity: Velocity[Condition],
    conditions: Sequence[Condition],
    negatives: Sequence[Condition],
    request: ImageRequest,
) -> VelocityAt:
    """Return the guided velocity of a batch.

    u + guidance_scale * (c - u) while 1 - sigma < cfg_trunc_ratio, then c alone. Both halves go through
    the model as one batch of 2B. A scale of 1 is c, without the work for u.
    """

    def velocity_at(x_BCHW: Tensor, sigma: float) -> Tensor:
        if 1 - sigma >= request.cfg_trunc_ratio:
            return velocity(x_BCHW, _filled(sigma, x_BCHW), conditions)
        if request.guidance_scale == 1:
            conditional_BCHW = velocity(x_BCHW, _filled(sigma, x_BCHW), conditions)
            return renormalised(conditional_BCHW, conditional_BCHW, request.renorm_cfg)
        both = torch.cat([x_BCHW, x_BCHW])
        velocity_2BCHW = velocity(both, _filled(sigma, both), [*conditions, *negatives])
        conditional_BCHW, negative_BCHW = velocity_2BCHW.chunk(2)
        guided_BCHW = negative_BCHW + request.guidance_scale * (conditional_BCHW - negative_BCHW)
        return renormalised(guided_BCHW, conditional_BCHW, request.renorm_cfg)

    return velocity_at


def renormalised(guided_BCHW: Tensor, conditional_BCHW: Tensor, ratio: float) -> Tensor:
    """Shrink each guided velocity whose L2 norm exceeds `ratio` times the conditional one's; 0 = never.

    Computed on the device for all samples at once, without asking it for a value.
    """
    if ratio == 0:
        return guided_BCHW
    limit_B111 = ratio * _norm(conditional_BCHW)
    smallest = torch.finfo(guided_BCHW.dtype).tiny  # a guided velocity of zero stays zero
    return guided_BCHW * (limit_B111 / _norm(guided_BCHW).clamp_min(smallest)).clamp_max(1)


def _norm(x_BCHW: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_BCHW, dim=(1, 2, 3), keepdim=True)


def _filled(sigma: float, x_BCHW: Tensor) -> Tensor:
    return torch.full((x_BCHW.shape[0],), sigma, dtype=torch.float32, device=x_BCHW.device)
