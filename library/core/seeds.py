"""Randomness without history: every random choice is a function of (seed, what it is for).

Nothing here keeps state, so there is nothing to save, restore or disturb: a resumed run, another worker count
or a preview in between draws exactly the same numbers.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *purpose: int | str) -> int:
    """Hash (seed, purpose...) into a 63-bit integer. Stable over processes, platforms and PYTHONHASHSEED."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def rng(seed: int, *purpose: int | str) -> random.Random:
    """Return a fresh `random.Random` for this purpose."""
    return random.Random(derive(seed, *purpose))


def unit(seed: int, *purpose: int | str) -> float:
    """Return one number in [0, 1) for this purpose, without building a generator."""
    return derive(seed, *purpose) / 2**63


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """Return a fresh CPU `torch.Generator` for this purpose."""
    import torch  # here, because this floor must be importable before torch

    return torch.Generator().manual_seed(derive(seed, *purpose))
