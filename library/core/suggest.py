"""Names in messages: the nearest valid one for a misspelt one, and a long list cut short."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest of `valid`, or an empty string when none is near."""
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def shorten(names: Sequence[str], most: int = 4) -> str:
    """Join the first `most` names and count the rest: "a, b, c, d and 5 more"."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
