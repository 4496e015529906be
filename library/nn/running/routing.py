"""Token routing (TREAD): in training, a share of a picture's tokens skips a run of blocks.

- Where a route begins, the tokens that are kept are gathered, and their rotary positions with them; behind
  its last block they are put back among the others, which are what they were at the beginning.
- Kept tokens stay in their order. Attention does not mind the order, and neighbours stay neighbours.
- Every picture of a batch has its own tokens dropped, so a batch is its pictures alone.
- All of it happens between blocks. What a block keeps for backward, or computes again, is none the wiser.

Paper: https://arxiv.org/abs/2501.04765.

Shape legend: T packed tokens, D features, K kept tokens of one picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from library.nn.packing import Layout, Packing
from library.options.tread import Route

RunBlock = Callable[[nn.Module, Tensor, Layout], Tensor]


@dataclass(frozen=True)
class Routing:
    """The routes of a batch, in their order. kept: of each route, of each picture, the numbers of the image
    tokens that take part (K,), int64, rising."""

    routes: tuple[Route, ...]
    kept: tuple[tuple[Tensor, ...], ...]

    def to(self, device: torch.device) -> Routing:
        """Return it on a device; nobody waits."""
        kept = (tuple(each.to(device, non_blocking=True) for each in route) for route in self.kept)
        return replace(self, kept=tuple(kept))


def kept_count(tokens: int, share: float) -> int:
    """Return how many of a picture's tokens are kept when a share is dropped; never none."""
    return max(tokens - round(tokens * share), 1)


def choose_kept(
    tokens: int, share: float, draw: torch.Generator, preferred_T: Tensor | None = None
) -> Tensor:
    """Draw which tokens of a picture are kept, (K,), rising. Those that are `preferred_T` come first."""
    order_T = torch.randperm(tokens, generator=draw)
    if preferred_T is not None:
        order_T = order_T[torch.argsort(preferred_T[order_T].to(torch.uint8), descending=True, stable=True)]
    return order_T[: kept_count(tokens, share)].sort().values


def run_blocks(
    blocks: Iterable[nn.Module],
    x_TD: Tensor,
    layout: Layout,
    run: RunBlock,
    routing: Routing | None = None,
    *,
    always: Sequence[int] | None = None,
) -> Tensor:
    """Return what the blocks make of x, one after another, (T, D).

    Args:
        run: runs one block on tokens and their layout.
        always: how many tokens each sample begins with that are no image tokens, and are never dropped.
    """
    blocks = list(blocks)
    if routing is None:
        return _through(blocks, x_TD, layout, run)
    done = 0
    for route, kept in zip(routing.routes, routing.kept, strict=True):
        x_TD = _through(blocks[done : route.first], x_TD, layout, run)
        done = route.last + 1
        places, short = _shortened(layout, kept, always or [0] * len(kept))
        inner_TD = _through(blocks[route.first : done], x_TD.index_select(0, places), short, run)
        x_TD = x_TD.index_copy(0, places, inner_TD)
    return _through(blocks[done:], x_TD, layout, run)


def _through(blocks: Sequence[nn.Module], x_TD: Tensor, layout: Layout, run: RunBlock) -> Tensor:
    for block in blocks:
        x_TD = run(block, x_TD, layout)
    return x_TD


def _shortened(layout: Layout, kept: Sequence[Tensor], always: Sequence[int]) -> tuple[Tensor, Layout]:
    """Return the places of the tokens that are kept in the packed sequence, and their layout."""
    device, lengths = layout.rope_TP2.device, layout.packing.lengths
    parts: list[Tensor] = []
    for begin, head, picture in zip(accumulate((0, *lengths[:-1])), always, kept, strict=True):
        if head:
            parts.append(torch.arange(begin, begin + head, device=device))
        parts.append(picture + (begin + head))
    places = torch.cat(parts)
    short = [head + len(picture) for head, picture in zip(always, kept, strict=True)]
    return places, Layout(Packing.of(short, device), layout.rope_TP2.index_select(0, places))
