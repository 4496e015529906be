"""Latents as tokens: a token is a patch, row by row and within it pixel by pixel, all channels of a pixel
together."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def grid_of(x_Chw: Tensor, patch: int, channels: int) -> tuple[int, int]:
    """Return rows and columns of patches. Raises ValueError for latents that cannot be cut into patches."""
    found, height, width = x_Chw.shape
    if found != channels or height % patch or width % patch:
        raise ValueError(
            f"latents of shape {tuple(x_Chw.shape)} do not fit: {channels} channels, and a height and width "
            f"divisible by {patch} are needed"
        )
    return height // patch, width // patch


def to_patches(x_Chw: Tensor, patch: int) -> Tensor:
    """(C, h, w) -> (tokens, patch * patch * C)."""
    return rearrange(x_Chw, "c (h p) (w q) -> (h w) (p q c)", p=patch, q=patch)
