"""Which pictures are held out for validation: a function of each picture's content alone.

So the choice stays when pictures are added, renamed or sorted differently, and copies of a picture, also at
another resolution or in another subset, are always on the same side.
"""

from __future__ import annotations

from collections.abc import Iterable

from library.core.seeds import unit


def held_out(digest: str, share: float, seed: int | None) -> bool:
    """Whether a picture with this content digest is among the `share` (0..1) held out; None is seed 0."""
    return unit(seed or 0, "validation", digest) < share


def held_out_digests(pictures: Iterable[tuple[str, float, int | None]]) -> frozenset[str]:
    """Return the digests held out, from (digest, share, seed) of each use of a picture.

    One use that is held out holds out all: a picture that one dataset validates on, none may train on.
    """
    return frozenset(digest for digest, share, seed in pictures if held_out(digest, share, seed))
