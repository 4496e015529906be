"""Scheduled sampling and ReflexFlow: where the model walks, and what that changes in the loss.

A picture that is trained at sigma is put on the path at a noisier sigma, and the model walks back in Euler's
steps. It arrives at x', not at x on the path, as it does when it draws pictures (exposure bias). There it is
trained towards the same velocity, noise - x0. ReflexFlow (arXiv 2512.04904) corrects that in two ways:

    e * (1 + alpha * |B| / mean |B|)          B = v(x) - v(x')    the loss e counts more where the walk hurts
    | v(x') / |v(x')| - (x' - x0) / |x' - x0| |^2                 anti-drift: away from the picture, wherever

On the path x - x0 = sigma * (noise - x0), so there the velocity noise - x0 has the direction of x - x0: the
sign of the second is that of the house convention. It is 2 - 2 cos of the angle between the two, 0 to 4.

The size of B, not B: which sign of a latent channel is which has no meaning, and a weight below zero would
teach mistakes. With its mean over the picture, the weights' mean is 1 + alpha, whatever the picture's size.

Shapes: C latent channels, h and w latent height and width; fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from library.core import seeds
from library.flow.loss import velocity_loss
from library.options.loss import LossOptions
from library.options.rollout import RolloutOptions

_TINY = 1e-12  # of a mean that is divided by
_ALMOST = 1e-6  # share of a step by which rounding may miss a whole number of them


def probability(options: RolloutOptions, step: int) -> float:
    """Return the share of the pictures of a training step, counted from 0, that steps are drawn for."""
    since = step - options.scheduled_sampling_start_step
    if not options.scheduled_sampling_ramp_steps:
        return options.scheduled_sampling_probability if since >= 0 else 0.0
    done = min(max(since / options.scheduled_sampling_ramp_steps, 0.0), 1.0)
    if options.scheduled_sampling_ramp_shape == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    start, end = options.scheduled_sampling_prob_start, options.scheduled_sampling_prob_end
    return (1 - done) * start + done * end


def draw_offset(options: RolloutOptions, seed: int, step: int, micro: int, slot: int) -> int:
    """Return how many steps the model should walk for a picture: a function of (seed, key)."""
    key = (step, micro, slot)
    if seeds.unit(seed, "rollout", *key) >= probability(options, step):
        return 0
    most, u = options.scheduled_sampling_max_step_offset, seeds.unit(seed, "rollout offset", *key)
    if options.scheduled_sampling_strategy == "uniform":
        return int(u * (most + 1))
    share = u * u if options.scheduled_sampling_strategy == "biased_early" else 1 - u * u
    return int(share * most + 0.5)


def walk(sigma: float, offset: int, step_size: float) -> tuple[float, ...]:
    """Return the sigmas of a walk down to `sigma`, which is the last of them; () for no walk.

    There is no more noise than sigma 1: a walk that would begin beyond begins there, and then has as few even
    steps as are not longer than `step_size`.
    """
    source = min(sigma + offset * step_size, 1.0)
    steps = math.ceil((source - sigma) / step_size - _ALMOST)
    if steps < 1:
        return ()
    return (*(source + (sigma - source) * done / steps for done in range(steps)), sigma)


@dataclass(frozen=True)
class Bias:
    """What ReflexFlow must know of a picture that was walked to; both are (C, h, w).

    clean: the model's velocity at the picture's own place on the path, without a graph. away: from the
    picture's latents to where the walk ended.
    """

    clean: Tensor
    away: Tensor


@dataclass(frozen=True)
class ReflexFlow:
    """The loss of a picture that was walked to. `losses`: what it is made of, as that of other pictures."""

    options: RolloutOptions
    losses: LossOptions

    def loss(
        self, predicted_Chw: Tensor, target_Chw: Tensor, sigma_1: Tensor, bias: Bias, mask_hw: Tensor | None
    ) -> Tensor:
        """Return the loss, (1,).

        Args:
            predicted_Chw: the velocity where the walk ended.
            mask_hw: how much each place counts, 0..1; None: all of them count.
        """
        options = self.options
        weights_Chw = emphasis(
            bias.clean, predicted_Chw.detach(), options.scheduled_sampling_reflexflow_alpha
        )
        weights_Chw = weights_Chw if mask_hw is None else weights_Chw * mask_hw
        plain_1 = velocity_loss(
            predicted_Chw[None], target_Chw[None], sigma_1, self.losses, weights_Chw[None]
        )
        drift_1 = anti_drift(predicted_Chw, bias.away, mask_hw)
        return (
            options.scheduled_sampling_reflexflow_beta2 * plain_1
            + options.scheduled_sampling_reflexflow_beta1 * drift_1
        )


def emphasis(clean_Chw: Tensor, biased_Chw: Tensor, alpha: float) -> Tensor:
    """Return the weights (C, h, w) of the loss of a picture that was walked to.

    Args:
        clean_Chw, biased_Chw: the model's velocities on the path, and where the walk ended.
    """
    bias_Chw = (clean_Chw - biased_Chw).abs()
    return 1 + alpha * bias_Chw / bias_Chw.mean().clamp_min(_TINY)


def anti_drift(velocity_Chw: Tensor, away_Chw: Tensor, mask_hw: Tensor | None) -> Tensor:
    """Return the squared distance of two directions, (1,): of the velocity, and away from the picture.

    Args:
        away_Chw: from the picture's latents to where the walk ended.
        mask_hw: how much each place counts in both, 0..1; None: all of them count.
    """
    pair = [each.float() if mask_hw is None else each.float() * mask_hw for each in (velocity_Chw, away_Chw)]
    velocity_1N, away_1N = (F.normalize(each.reshape(1, -1), dim=1) for each in pair)
    return (velocity_1N - away_1N).square().sum(1)
