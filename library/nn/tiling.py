"""Apply a function to an image in overlapping tiles and blend the results."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def map_tiles(
    function: Callable[[Tensor], Tensor], x_BCHW: Tensor, *, tile: int, overlap: int, stride: int
) -> Tensor:
    """Return `function(x)`, computed tile by tile, where `function` enlarges height and width `stride` times.

    Neighbouring tiles share at least `overlap` rows or columns of `x`, over which one fades into the other.
    An image that fits in one tile is passed as it is, and a `function` of single places is computed exactly.
    """
    assert 0 <= overlap < tile, "tiles must advance"
    height, width = x_BCHW.shape[2:]
    if height <= tile and width <= tile:
        return function(x_BCHW)
    total, weights = None, None
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            part_BCHW = function(x_BCHW[:, :, top : top + tile, left : left + tile])
            fade_HW = torch.outer(
                *(_fade(length, overlap * stride, part_BCHW) for length in part_BCHW.shape[2:]),
            )
            if total is None:
                size = (height * stride, width * stride)
                total = part_BCHW.new_zeros((*part_BCHW.shape[:2], *size))
                weights = part_BCHW.new_zeros(size)
            rows = slice(top * stride, top * stride + part_BCHW.shape[2])
            columns = slice(left * stride, left * stride + part_BCHW.shape[3])
            total[:, :, rows, columns] += part_BCHW * fade_HW
            weights[rows, columns] += fade_HW
    return total / weights


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles begin: spread evenly, the first at 0, the last ending at `length`."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _fade(length: int, overlap: int, like: Tensor) -> Tensor:
    """Return blend weights that rise over the first and fall over the last `overlap` places; never zero."""
    places = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(places, places.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
