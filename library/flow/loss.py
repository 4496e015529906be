"""The training loss: one fp32 number per picture.

A mask multiplies the elementwise loss and the mean is still taken over all of C, H and W, as in the
reference tool: a picture whose mask keeps a tenth of its area counts a tenth, and a pixel counts the same
in every picture.

Shapes: B batch, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from library.options.loss import LossOptions


def velocity_loss(
    predicted_BCHW: Tensor,
    target_BCHW: Tensor,
    sigma_B: Tensor,
    options: LossOptions,
    mask_B1HW: Tensor | None = None,
    weights_B: Tensor | None = None,
) -> Tensor:
    """Return each picture's loss, fp32 (B,): elementwise, times mask, mean over C, H, W, times weight.

    A mask may also have all channels, (B, C, H, W).
    """
    difference_BCHW = predicted_BCHW.float() - target_BCHW.float()
    loss_BCHW = _elementwise(difference_BCHW, sigma_B, options)
    if mask_B1HW is not None:
        loss_BCHW = loss_BCHW * mask_B1HW.float()
    loss_B = loss_BCHW.mean(dim=(1, 2, 3))
    return loss_B if weights_B is None else loss_B * weights_B.float()


def huber_threshold(sigma_B: Tensor, options: LossOptions) -> Tensor:
    """Return the Huber threshold at sigma, fp32 (B,).

    exponential falls from 1 to huber_c geometrically. snr is (1-c)/(1+n)^2 + c with n the ratio of noise to
    signal: on this path n = sigma/(1-sigma), so 1/(1+n)^2 is (1-sigma)^2. All are multiplied by huber_scale.
    """
    sigma_B, c = sigma_B.float(), options.huber_c
    if options.huber_schedule == "exponential":
        threshold_B = torch.exp(math.log(c) * sigma_B)
    elif options.huber_schedule == "snr":
        threshold_B = (1 - c) * (1 - sigma_B) ** 2 + c
    else:
        threshold_B = torch.full_like(sigma_B, c)
    return threshold_B * options.huber_scale


def sigma_weight(weighting_scheme: str, sigma_B: Tensor) -> Tensor:
    """Return the loss weight at sigma, fp32 (B,): that of cosmap, or 1.

    cosmap, 2 / (pi (1 - 2 sigma + 2 sigma^2)), is the density under which uniform sampling of the
    velocity loss has the cosine schedule's distribution of noise (SD3 paper, section 3.1). Its mean over
    uniform sigma is 1, and it weighs the velocity loss itself.
    """
    sigma_B = sigma_B.float()
    if weighting_scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma_B + 2 * sigma_B**2))
    return torch.ones_like(sigma_B)


def _elementwise(difference_BCHW: Tensor, sigma_B: Tensor, options: LossOptions) -> Tensor:
    if options.loss_type == "l2":
        return difference_BCHW.square()
    if options.loss_type == "l1":
        return difference_BCHW.abs()
    # Pseudo-Huber: quadratic for differences far below the threshold d, linear far above. "huber" has the
    # slope 2d out there and unit curvature at 0; "smooth_l1" has the slope 2 and the curvature 2/d.
    d_B111 = huber_threshold(sigma_B, options).view(-1, 1, 1, 1)
    loss_BCHW = 2 * (torch.sqrt(difference_BCHW.square() + d_B111.square()) - d_B111)
    return loss_BCHW * d_B111 if options.loss_type == "huber" else loss_BCHW
