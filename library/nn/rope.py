"""Rotary position embedding over several axes, with real fp32 tables.

A head's d features are pairs; pair p of a token at position m is turned by the angle m * theta^(-2p/d). With
several axes the head is cut into one part for each. Tables hold cos and sin side by side, (T, d/2, 2), in
fp32. Angles are computed as each family's reference implementation does: Lumina's in fp64, Kandinsky's in
fp32, where they differ from the exact ones by up to 3e-5 at the last position.

Shape legend: T tokens, H heads, P pairs (half of head_dim), A axes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from library.core.device import sent

_TABLES_KEPT = 32


def rotate(x_THD: Tensor, table_TP2: Tensor) -> Tensor:
    """Turn each pair of x by its token's angles; computed and returned in the table's fp32."""
    even, odd = x_THD.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table_TP2.unsqueeze(1).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class _Kept:
    """The last few tables that were used, by what they were made for."""

    def __init__(self) -> None:
        self._tables: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return the table, made if it is not there."""
        if key not in self._tables:
            self._tables[key] = make()
        self._tables.move_to_end(key)
        if len(self._tables) > _TABLES_KEPT:
            self._tables.popitem(last=False)
        return self._tables[key]


class RopeTables:
    """Tables of samples that are a caption followed by an image; the last few that were used are kept.

    Text token i lies at position (i, 0, 0), an image token at (caption length, row, column).
    """

    def __init__(self, axes_dims: Sequence[int], theta: float) -> None:
        self.axes_dims = tuple(axes_dims)
        self.theta = theta
        self._kept = _Kept()

    def sample(self, caption_length: int, height: int, width: int, device: torch.device) -> Tensor:
        """Return the (caption_length + height * width, P, 2) table of one sample; sizes are in tokens."""
        sizes = (caption_length, height, width)
        # fp64 is missing on some accelerators (MPS), and the table is small
        place = device if device.type in ("cpu", "cuda") else torch.device("cpu")
        return self._kept.get((sizes, device), lambda: self._make(*sizes, place).to(device))

    def _make(self, caption_length: int, height: int, width: int, device: torch.device) -> Tensor:
        text = torch.zeros(caption_length, 3, dtype=torch.float64, device=device)
        text[:, 0] = torch.arange(caption_length, device=device)
        image = _grid(caption_length, height, width, torch.float64, device)
        exponents = [
            torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim for dim in self.axes_dims
        ]
        return _table(torch.cat((text, image)), [self.theta**-each for each in exponents])


class ApartRopeTables:
    """Tables of texts and of images that are never joined: a text has one axis, an image three.

    Text token i lies at position i, an image token at (0, row, column).
    """

    def __init__(self, axes_dims: Sequence[int], theta: float) -> None:
        self.axes_dims = tuple(axes_dims)
        self.theta = theta
        self._kept = _Kept()

    def text(self, length: int, device: torch.device) -> Tensor:
        """Return the (length, P, 2) table of a text."""
        return self._kept.get((length, device), lambda: sent(self._make_text(length), device))

    def image(self, height: int, width: int, device: torch.device) -> Tensor:
        """Return the (height * width, P, 2) table of an image; sizes are in tokens."""
        key = (height, width, device)
        return self._kept.get(key, lambda: sent(self._make_image(height, width), device))

    def _make_text(self, length: int) -> Tensor:
        positions_T1 = torch.arange(length, dtype=torch.float32, device="cpu").unsqueeze(1)
        return _table(positions_T1, [self._frequencies(sum(self.axes_dims))])

    def _make_image(self, height: int, width: int) -> Tensor:
        positions_TA = _grid(0, height, width, torch.float32, torch.device("cpu"))
        return _table(positions_TA, [self._frequencies(dim) for dim in self.axes_dims])

    def _frequencies(self, dim: int) -> Tensor:
        steps = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
        return torch.exp(-math.log(self.theta) * steps / (dim // 2))


def _grid(first: int, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Positions (first, row, column), row by row."""
    positions = torch.empty(height, width, 3, dtype=dtype, device=device)
    positions[..., 0] = first
    positions[..., 1] = torch.arange(height, device=device)[:, None]
    positions[..., 2] = torch.arange(width, device=device)
    return positions.flatten(0, 1)


def _table(positions_TA: Tensor, frequencies: Sequence[Tensor]) -> Tensor:
    """Cos and sin of each position times each frequency of its axis."""
    axes = zip(positions_TA.unbind(1), frequencies, strict=True)
    angles_TP = torch.cat([torch.outer(positions_T, each) for positions_T, each in axes], dim=1)
    return torch.stack((angles_TP.cos(), angles_TP.sin()), dim=-1).float()
