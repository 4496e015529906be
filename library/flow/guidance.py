"""Classifier-free guidance: all the way or only in its noisy part, and with a bounded norm if asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from library.flow.solver import VelocityAt
from library.options.request import ImageRequest

ConditionT = TypeVar("ConditionT")
# (x_BCHW, sigma_B, conditions) -> velocity_BCHW
Velocity = Callable[[Tensor, Tensor, Sequence[ConditionT]], Tensor]
_NO_GUIDANCE = 1e-6  # how near to 1 a scale is none, as in the official sampler of Kandinsky


def guided(
    velocity: Velocity[ConditionT],
    conditions: Sequence[ConditionT],
    negatives: Sequence[ConditionT],
    request: ImageRequest,
    *,
    sequential: bool = False,
) -> VelocityAt:
    """Return the guided velocity of a batch.

    u + guidance_scale * (c - u) while 1 - sigma < cfg_trunc_ratio, then c alone. A scale of 1 is c, without
    the work for u. Both go through the model as one batch of 2B, or with `sequential` one after the other:
    less memory, and the same up to rounding.
    """

    def both(x_BCHW: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        if sequential:
            sigma_B = _filled(sigma, x_BCHW)
            return velocity(x_BCHW, sigma_B, conditions), velocity(x_BCHW, sigma_B, negatives)
        x_2BCHW = torch.cat([x_BCHW, x_BCHW])
        velocity_2BCHW = velocity(x_2BCHW, _filled(sigma, x_2BCHW), [*conditions, *negatives])
        conditional_BCHW, negative_BCHW = velocity_2BCHW.chunk(2)
        return conditional_BCHW, negative_BCHW

    def velocity_at(x_BCHW: Tensor, sigma: float) -> Tensor:
        if 1 - sigma >= request.cfg_trunc_ratio:
            return velocity(x_BCHW, _filled(sigma, x_BCHW), conditions)
        if abs(request.guidance_scale - 1) < _NO_GUIDANCE:
            conditional_BCHW = velocity(x_BCHW, _filled(sigma, x_BCHW), conditions)
            return renormalised(conditional_BCHW, conditional_BCHW, request.renorm_cfg)
        conditional_BCHW, negative_BCHW = both(x_BCHW, sigma)
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
