"""Tokens of pictures that skip blocks of the model in training (TREAD)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from library.core.errors import ConfigError
from library.options.group import OptionGroup, option
from library.options.optimizer import steps_or_share

EXAMPLE = "2:-2:0.5"


@dataclass(frozen=True, order=True)
class Route:
    """Blocks that a share of each picture's tokens skips.

    first, last: numbers of blocks from 0, both among those that are skipped; below 0 they count from the end.
    """

    first: int
    last: int
    share: float

    def __str__(self) -> str:
        return f"{self.first}:{self.last}:{self.share:g}"

    @classmethod
    def parse(cls, text: str) -> Route:
        """Read `first:last:share`. Raises ConfigError for anything else."""
        try:
            first, last, share = text.split(":")
            route = cls(int(first), int(last), float(share))
        except ValueError:
            raise ConfigError(
                f"--tread_routes '{text}' is not a route: write start:end:share, such as {EXAMPLE}, which is "
                f"the first block, the last one, and which share of a picture's tokens skips them."
            ) from None
        if not 0 < route.share < 1:
            raise ConfigError(
                f"--tread_routes {text} drops a share of {share} of the tokens; it must be above 0 and below "
                f"1, such as 0.5."
            )
        return route


def resolved(routes: Iterable[Route], blocks: int) -> tuple[Route, ...]:
    """Return routes in their order in a model that has so many blocks to route, counted from the start.

    Raises:
        ConfigError: a block that there is not, a route that ends before it begins, or a block in two routes.
    """
    found = sorted((_from_start(route, blocks), route) for route in routes)
    for (before, one), (after, other) in pairwise(found):
        if after.first <= before.last:
            raise ConfigError(
                f"--tread_routes {one} and {other} overlap: block {after.first} is in both. Let the one end "
                f"before the other begins."
            )
    return tuple(route for route, _ in found)


def _from_start(route: Route, blocks: int) -> Route:
    first, last = (n + blocks if n < 0 else n for n in (route.first, route.last))
    for number, written in ((first, route.first), (last, route.last)):
        if not 0 <= number < blocks:
            raise ConfigError(
                f"--tread_routes {route}: there is no block {written}; this model has {blocks} that tokens "
                f"can skip, 0 to {blocks - 1}, or -{blocks} to -1 counted from the end."
            )
    if last < first:
        raise ConfigError(
            f"--tread_routes {route} ends at block {last}, before it begins at block {first}; write the "
            f"earlier block first."
        )
    return replace(route, first=first, last=last)


@dataclass(frozen=True, kw_only=True)
class TreadOptions(OptionGroup):
    """Token routing (TREAD).

    Steps are faster because a share of each picture's tokens, drawn anew in every step, skips some blocks;
    see docs/token_routing.md. Validation and sample pictures always have all tokens.
    """

    tread_routes: tuple[str, ...] = option(
        (),
        "let this share of a picture's tokens skip the blocks from start to end, both included; below 0 they "
        "count from the last one, which is -1",
        nargs="*",
        metavar="START:END:SHARE",
    )
    tread_off_last: int | float = option(
        0,
        "train the last N steps with all tokens; below 1 or with % a share of all steps",
        parse=steps_or_share,
    )
    tread_keep_mask: bool = option(
        False,
        "drop tokens outside of a picture's mask first (--masked_loss), and of the inside only the rest",
    )

    def __post_init__(self) -> None:
        self.routes  # noqa: B018  (a mistake in them shows here)

    @property
    def routes(self) -> tuple[Route, ...]:
        """The routes as they are written. Raises ConfigError for what is none."""
        return tuple(Route.parse(text) for text in self.tread_routes)

    def check(self, blocks: int) -> None:
        """Raise ConfigError for routes that do not fit a model with so many blocks to route."""
        resolved(self.routes, blocks)

    def steps_off(self, total_steps: int) -> int:
        """Return how many steps at the end of a run have all tokens."""
        off = self.tread_off_last
        return min(int(off * total_steps) if isinstance(off, float) else off, total_steps)

    def adjustments(self) -> Iterator[str]:
        """Tell of flags that have nothing to do."""
        yield from super().adjustments()
        if not self.tread_routes:
            names = ("tread_off_last", "tread_keep_mask")
            yield from self.without_effect(names, "no token is dropped without --tread_routes")
        elif isinstance(self.tread_off_last, float) and self.tread_off_last == 1:
            yield from self.without_effect(("tread_routes",), "--tread_off_last 100% leaves no step to it")
