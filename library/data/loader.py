"""Planned draws become batches of tensors, prepared ahead by threads.

What a batch holds depends only on (seed, step, micro), so any step can be asked for first, and the number of
threads changes nothing but the speed. Threads, not processes: decoding, hashing and torch release the
interpreter lock, and threads share the caches in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from library.core.ahead import map_ahead
from library.data.batch import Batch, Condition
from library.data.captions import draw_caption
from library.data.images import is_flipped, load_pixels
from library.data.items import PRESERVED, Draw, Item, Manifest
from library.data.plan import Plan
from library.data.sources import LatentSource, TextSource
from library.data.tensors import mask_to_latent_size, pixels_to_tensor


@dataclass(frozen=True)
class Sources:
    """Where latents and text features come from. None: batches hold pixels, or captions only."""

    latents: LatentSource | None = None
    texts: TextSource | None = None


@dataclass(frozen=True)
class LoaderSettings:
    """How batches are made.

    total_steps: optimizer steps of the run, for what changes in its course. workers: threads; 0 prepares each
    batch when it is asked for. latent_stride: pixels along one side of a latent pixel. prior_loss_weight:
    loss weight of regularisation pictures. pin_memory: put tensors where a GPU can fetch them.
    """

    seed: int
    total_steps: int
    rank: int = 0
    world: int = 1
    workers: int = 0
    latent_stride: int = 8
    prior_loss_weight: float = 1.0
    pin_memory: bool = False


class BatchLoader:
    """Batches of one process, in the order of the plan."""

    def __init__(self, manifest: Manifest, plan: Plan, sources: Sources, settings: LoaderSettings) -> None:
        self._manifest = manifest
        self._plan = plan
        self._sources = sources
        self._settings = settings

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, int, Batch]]:
        """Yield (step, micro, batch) for the steps from `start` up to, but not including, `stop`.

        A process whose part of a micro-batch is empty gets a batch without draws. Close the iterator to stop
        early.

        Raises:
            DataError: a picture or a cache entry became unreadable; raised at the batch that needs it.
        """
        workers = self._settings.workers
        return map_ahead(self._at, self._places(start, stop), threads=workers, ahead=2 * workers)

    def batch(self, draws: Sequence[Draw]) -> Batch:
        """Return the batch of these draws, which must be of one dataset and one bucket."""
        if not draws:
            return Batch(draws=(), names=(), captions=(), weights_B=torch.zeros(0))
        items = [self._manifest.items[draw.item] for draw in draws]
        captions = [self._caption(*pair) for pair in zip(items, draws, strict=True)]
        pictures = [self._picture(*pair) for pair in zip(items, draws, strict=True)]
        tensors_BCHW = torch.stack([picture for picture, _ in pictures])
        batch = Batch(
            draws=tuple(draws),
            names=tuple(str(item.path) for item in items),
            captions=tuple(captions),
            weights_B=torch.tensor([self._weight(item) for item in items], dtype=torch.float32),
            latents_BCHW=tensors_BCHW if self._sources.latents else None,
            pixels_BCHW=None if self._sources.latents else tensors_BCHW,
            conditions=self._conditions(items, captions),
            masks_B1HW=_stack_masks([mask for _, mask in pictures]),
            network_multiplier=items[0].dataset.network_multiplier,
            preserved=tuple(bool(item.subset.custom_attributes.get(PRESERVED)) for item in items),
        )
        return _pinned(batch) if self._settings.pin_memory else batch

    def _places(self, start: int, stop: int) -> Iterator[tuple[int, int, tuple[Draw, ...]]]:
        for step in range(start, stop):
            for micro, micro_batch in enumerate(self._plan.step(step)):
                yield step, micro, micro_batch.of_rank(self._settings.rank, self._settings.world)

    def _at(self, place: tuple[int, int, tuple[Draw, ...]]) -> tuple[int, int, Batch]:
        step, micro, draws = place
        return step, micro, self.batch(draws)

    def _picture(self, item: Item, draw: Draw) -> tuple[Tensor, Tensor | None]:
        """Return latents (C, h, w) or pixels (3, H, W), fp32, and the mask (h, w) if there is one."""
        key = draw.key(self._settings.seed)
        flip = is_flipped(item, key)
        if self._sources.latents:
            latents, mask = self._sources.latents.get(item, flip=flip)
            return latents.float(), mask
        pixels, mask_HW = load_pixels(item, key, flip=flip)
        mask = None if mask_HW is None else mask_to_latent_size(mask_HW, self._settings.latent_stride)
        return pixels_to_tensor(pixels), mask

    def _caption(self, item: Item, draw: Draw) -> str:
        """With cached features a caption is one of the cached variants; without, draws are unlimited."""
        return draw_caption(
            item,
            seed=self._settings.seed,
            epoch=draw.epoch,
            repeat=draw.repeat,
            step=draw.step,
            total_steps=self._settings.total_steps,
            max_variants=self._sources.texts.max_variants if self._sources.texts else None,
        )

    def _conditions(self, items: Sequence[Item], captions: Sequence[str]) -> tuple[Condition, ...] | None:
        if self._sources.texts is None:
            return None
        return tuple(map(self._sources.texts.condition, items, captions))

    def _weight(self, item: Item) -> float:
        return self._settings.prior_loss_weight if item.subset.is_reg else 1.0


def _stack_masks(masks: Sequence[Tensor | None]) -> Tensor | None:
    """Stack masks to (B, 1, h, w); a picture without one is wanted whole. None if no picture has one."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    return torch.stack([torch.ones_like(given[0]) if mask is None else mask for mask in masks]).unsqueeze(1)


def _pinned(batch: Batch) -> Batch:
    """Copy a batch's tensors into page-locked memory, from where a GPU fetches them without waiting."""
    tensors = {name: value.pin_memory() for name, value in vars(batch).items() if isinstance(value, Tensor)}
    conditions = batch.conditions and tuple(
        Condition(c.tokens_LD.pin_memory(), None if c.pooled_D is None else c.pooled_D.pin_memory())
        for c in batch.conditions
    )
    return replace(batch, conditions=conditions, **tensors)
