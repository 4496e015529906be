"""From decoded pictures to tensors: the same arithmetic for cached and for online encoding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d


def pixels_to_tensor(pixels: np.ndarray) -> Tensor:
    """Turn a picture (H, W, 3) of bytes into a tensor (3, H, W), fp32, in [-1, 1]."""
    bytes_HWC = torch.from_numpy(
        np.array(pixels, order="C")
    )  # a copy, because decoded arrays may be read-only
    return (
        bytes_HWC.permute(2, 0, 1)
        .to(torch.float32, memory_format=torch.contiguous_format)
        .div_(127.5)
        .sub_(1.0)
    )


def mask_to_latent_size(mask: np.ndarray, stride: int) -> Tensor:
    """Average a mask (H, W) in 0..1 over squares of `stride` pixels: one fp32 value a latent pixel."""
    height, width = mask.shape
    mask_1HW = torch.from_numpy(np.array(mask, dtype=np.float32, order="C"))[None]
    return adaptive_avg_pool2d(mask_1HW, (height // stride, width // stride))[0]
