"""Rotary position embedding over several axes, with real fp32 tables.

A head's d features are pairs; pair p of a token at position m is turned by the angle m * theta^(-2p/d). With
several axes the head is cut into one part for each. Tables hold cos and sin side by side, (T, d/2, 2); angles
are computed in fp64, as the reference implementations do, and stored in fp32.

Shape legend: T tokens, H heads, P pairs (half of head_dim).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

_TABLES_KEPT = 32


def rotate(x_THD: Tensor, table_TP2: Tensor) -> Tensor:
    """Turn each pair of x by its token's angles; computed and returned in the table's fp32."""
    even, odd = x_THD.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table_TP2.unsqueeze(1).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class RopeTables:
    """Tables of samples that are a caption followed by an image; the last few that were used are kept.

    Text token i lies at position (i, 0, 0), an image token at (caption length, row, column).
    """

    def __init__(self, axes_dims: Sequence[int], theta: float) -> None:
        self.axes_dims = tuple(axes_dims)
        self.theta = theta
        self._kept: OrderedDict[tuple[int, int, int, torch.device], Tensor] = OrderedDict()

    def sample(self, caption_length: int, height: int, width: int, device: torch.device) -> Tensor:
        """Return the (caption_length + height * width, P, 2) table of one sample; sizes are in tokens."""
        key = (caption_length, height, width, device)
        if key not in self._kept:
            # fp64 is missing on some accelerators (MPS), and the table is small
            place = device if device.type in ("cpu", "cuda") else torch.device("cpu")
            self._kept[key] = self._make(caption_length, height, width, place).to(device)
        self._kept.move_to_end(key)
        if len(self._kept) > _TABLES_KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]

    def _make(self, caption_length: int, height: int, width: int, device: torch.device) -> Tensor:
        text = torch.zeros(caption_length, 3, dtype=torch.float64, device=device)
        text[:, 0] = torch.arange(caption_length, device=device)
        image = torch.empty(height, width, 3, dtype=torch.float64, device=device)
        image[..., 0] = caption_length
        image[..., 1] = torch.arange(height, device=device)[:, None]
        image[..., 2] = torch.arange(width, device=device)
        positions_TA = torch.cat((text, image.flatten(0, 1)))
        angles = [
            torch.outer(positions_TA[:, axis], _frequencies(dim, self.theta, device))
            for axis, dim in enumerate(self.axes_dims)
        ]
        angles_TP = torch.cat(angles, dim=1)
        return torch.stack((angles_TP.cos(), angles_TP.sin()), dim=-1).float()


def _frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    return theta**-exponents
