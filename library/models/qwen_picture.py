"""A source picture as Qwen2.5-VL sees it when Kandinsky edits: halved, resized, cut into patches.

The official code cuts the source to the size of the target, halves that with torchvision's `resize` (of a
tensor: bilinear in floats, with antialiasing, which is the default since torchvision 0.17, rounded to 8 bits)
and hands it to Qwen's processor. That resizes to multiples of 28 pixels, bicubic, and normalises with CLIP's
mean and deviation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from library.models.qwen_grid import FRAMES, MERGE, PATCH, Grid, half_size, picture_grid

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
_DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


@dataclass(frozen=True)
class QwenPicture:
    """Patches (N, 1176) in fp32, four neighbours after each other, and how many there are each way."""

    patches_NP: np.ndarray
    grid_thw: Grid


def qwen_picture(pixels: np.ndarray) -> QwenPicture:
    """Return a picture, (H, W, 3) uint8 and as large as the target, as Qwen takes it."""
    height, width = pixels.shape[:2]
    half = _halved(pixels)
    grid = picture_grid((width, height))
    size = (grid[2] * PATCH, grid[1] * PATCH)
    resized = np.asarray(Image.fromarray(np.ascontiguousarray(half)).resize(size, Image.Resampling.BICUBIC))
    values = (resized.astype(np.float32) / np.float32(255) - _MEAN) / _DEVIATION
    return QwenPicture(_patches(values, grid), grid)


def _halved(pixels: np.ndarray) -> np.ndarray:
    """Halve as torchvision does."""
    import torch
    import torch.nn.functional as F

    width, height = half_size((pixels.shape[1], pixels.shape[0]))
    pixels_BCHW = torch.from_numpy(np.moveaxis(pixels, 2, 0).astype(np.float32))[None]
    half_BCHW = F.interpolate(pixels_BCHW, size=(height, width), mode="bilinear", antialias=True)
    return np.moveaxis(half_BCHW[0].round().to(torch.uint8).numpy(), 0, 2)


def _patches(values: np.ndarray, grid: Grid) -> np.ndarray:
    """Cut (H, W, 3) into patches: rows and columns of squares, the four patches of each, then their values.

    A patch is channels x frames x 14 x 14; a still picture stands for both frames.
    """
    _, rows, columns = grid
    cut = values.reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    ordered = cut.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    still = np.broadcast_to(ordered, (*ordered.shape[:5], FRAMES, PATCH, PATCH))
    return still.reshape(rows * columns, -1)
