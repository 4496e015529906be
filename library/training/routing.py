"""Which tokens skip blocks of the model in a training step, and what that saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from einops import reduce
from torch import Tensor

from library.core import seeds
from library.data.batch import Batch
from library.nn.running.routing import Routing, choose_kept, kept_count
from library.nn.transformer import Transformer
from library.options.tread import Route, TreadOptions, resolved

_INSIDE = 0.5  # a token is in a mask whose mean over the token's pixels is at least this


@dataclass(frozen=True)
class Router:
    """Draws the tokens that are kept: functions of (seed, route, step, micro-batch, slot).

    patch: latent pixels along a side of a token. until: the step, counted from 0, from which on all are kept.
    prefers_mask: whether tokens inside of a mask are kept first.
    """

    routes: tuple[Route, ...]
    patch: int
    seed: int
    until: int
    prefers_mask: bool = False

    @classmethod
    def of(
        cls, options: TreadOptions, model: Transformer, patch: int, *, seed: int, total_steps: int
    ) -> Router:
        """Return the router of a run."""
        return cls(
            routes=resolved(options.routes, len(model.routed_blocks)),
            patch=patch,
            seed=seed,
            until=total_steps - options.steps_off(total_steps),
            prefers_mask=options.tread_keep_mask,
        )

    def kept(self, batch: Batch, latents: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
        """Return what `Routing.kept` is of a batch whose latents have such shapes; () to keep all tokens."""
        if not batch.draws or batch.draws[0].step >= self.until:  # all draws of a batch are of one step
            return ()
        counts = [latent.shape[-2] * latent.shape[-1] // self.patch**2 for latent in latents]
        return tuple(
            tuple(
                choose_kept(
                    count,
                    route.share,
                    seeds.generator(self.seed, "route", number, draw.step, draw.micro, draw.slot),
                    inside_T,
                )
                for draw, count, inside_T in zip(batch.draws, counts, self._inside(batch), strict=True)
            )
            for number, route in enumerate(self.routes)
        )

    def routing(self, batch: Batch) -> Routing | None:
        """Return the routing of a batch that has its `kept`; None if all tokens take part."""
        return Routing(self.routes, batch.kept) if batch.kept else None

    def _inside(self, batch: Batch) -> Sequence[Tensor | None]:
        """Return of each picture which tokens lie in its mask (T,), or None if that does not matter."""
        if not self.prefers_mask or batch.masks is None:
            return [None] * len(batch.draws)
        size = {"p": self.patch, "q": self.patch}
        shares = [reduce(mask, "(h p) (w q) -> (h w)", "mean", **size) for mask in batch.masks]
        return [share_T >= _INSIDE for share_T in shares]


def routing_lines(
    model: Transformer, options: TreadOptions, *, image: int, text: int, total_steps: int
) -> list[str]:
    """Return what routes do to the blocks of a model: tokens that each sees, and what is saved.

    image, text: tokens of the picture and of the text that the figures are for.
    """
    blocks = len(model.routed_blocks)
    routes = resolved(options.routes, blocks)
    if not routes:
        return []
    seen = tokens_seen(routes, blocks, image)
    saved = saved_share(model, routes, image=image, text=text)
    lines = [
        f"blocks {route.first} to {route.last} of 0 to {blocks - 1} see {seen[route.first]} of a picture's "
        f"{image} tokens (--tread_routes)"
        for route in routes
    ]
    off = options.steps_off(total_steps)
    lines.append(
        f"{saved:.1%} of what the model's blocks compute is saved, with a text of {text} tokens"
        + (f"; not in the last {off} of {total_steps} steps" if off else "")
    )
    return lines


def tokens_seen(routes: Sequence[Route], blocks: int, image: int) -> list[int]:
    """Return how many of so many image tokens each block sees."""
    seen = [image] * blocks
    for route in routes:
        count = kept_count(image, route.share)
        seen[route.first : route.last + 1] = [count] * (route.last + 1 - route.first)
    return seen


def saved_share(model: Transformer, routes: Sequence[Route], *, image: int, text: int) -> float:
    """Return which share of the products of all of a model's blocks the routes save, for one picture."""
    blocks = len(model.routed_blocks)
    routed = model.block_flops(tokens_seen(routes, blocks, image), image, text)
    return 1 - routed / model.block_flops([image] * blocks, image, text)
