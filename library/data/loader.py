"""Planned draws become batches of tensors, prepared ahead by threads.

What a batch holds depends only on (seed, step, micro), so any step can be asked for first, and the number of
threads changes nothing but the speed. Threads, not processes: decoding, hashing and torch release the
interpreter lock, and threads share the caches in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.core.ahead import map_ahead
from library.data.batch import Batch, Condition
from library.data.cached import LatentCache, TextCache
from library.data.captions import draw_caption
from library.data.delivery import carrier_for, delivered
from library.data.images import drawn_source, is_flipped, load_pixels, load_source
from library.data.items import Draw, DrawKey, Item, Manifest
from library.data.plan import Plan
from library.data.prompt import SourcePicture
from library.data.tensors import mask_to_latent_size, pixels_to_tensor


@dataclass(frozen=True)
class Caches:
    """Latents and text features that are cached. None: batches hold pixels, or captions only."""

    latents: LatentCache | None = None
    texts: TextCache | None = None


@dataclass(frozen=True)
class LoaderSettings:
    """How batches are made.

    total_steps: optimizer steps of the run, for what changes in its course. workers: threads; 0 prepares each
    batch when it is asked for. latent_stride: pixels along one side of a latent pixel. prior_loss_weight:
    loss weight of regularisation pictures. source_dropout: share of the draws of an edited picture that go
    without its source. device: where batches go; a GPU fetches them ahead.
    """

    seed: int
    total_steps: int
    rank: int = 0
    workers: int = 0
    latent_stride: int = 8
    prior_loss_weight: float = 1.0
    source_dropout: float = 0.0
    device: torch.device = torch.device("cpu")


@dataclass(frozen=True)
class _View:
    """An item as a draw shows it. key: decides its pixels; None for a held-out one, which never changes."""

    item: Item
    caption: str
    key: DrawKey | None
    flip: bool
    source: SourcePicture | None


@dataclass(frozen=True)
class _Picture:
    """What a view holds: latents (C, h, w) or pixels (3, H, W), fp32, of the picture and of its source, and
    the mask (h, w)."""

    picture: Tensor
    mask: Tensor | None
    source: Tensor | None


class BatchLoader:
    """Batches of one process, in the order of the plan."""

    def __init__(
        self,
        manifest: Manifest,
        plan: Plan,
        caches: Caches,
        settings: LoaderSettings,
        *,
        complete: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        """`complete` adds what else a training batch needs; the threads that prepare batches call it."""
        self._manifest = manifest
        self._plan = plan
        self._caches = caches
        self._settings = settings
        self._complete = complete
        self._carrier = carrier_for(settings.device)

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, int, Batch]]:
        """Yield (step, micro, batch) for the steps from `start` up to, but not including, `stop`.

        A process whose part of a micro-batch is empty gets a batch without draws. Close the iterator to stop
        early.

        Raises:
            DataError: a picture or a cache entry became unreadable; raised at the batch that needs it.
        """
        workers = self._settings.workers
        batches = map_ahead(self._at, self._places(start, stop), threads=workers, ahead=2 * workers)
        return batches if self._carrier is None else delivered(batches, self._carrier)

    def held_out(self, items: Sequence[Item]) -> Iterator[Batch]:
        """Yield each of these held-out pictures as a batch of its own. Close the iterator to stop early.

        Raises:
            DataError: as `batches`.
        """
        draws = [Draw(item.index, repeat=0, epoch=0, step=0, micro=0, slot=0) for item in items]
        workers = self._settings.workers

        def alone(draw: Draw) -> Batch:
            return self._fetchable(self.batch([draw]))

        return map_ahead(alone, draws, threads=workers, ahead=2 * workers)

    def batch(self, draws: Sequence[Draw]) -> Batch:
        """Return the batch of these draws, which must be of datasets with the same network_multiplier."""
        if not draws:
            return Batch(draws=(), names=(), captions=(), weights_B=torch.zeros(0))
        views = [self._view(draw) for draw in draws]
        items = [view.item for view in views]
        held = [self._picture(view) for view in views]
        pictures = tuple(each.picture for each in held)
        sources = tuple(each.source for each in held) if any(view.source for view in views) else None
        cached = self._caches.latents is not None
        return Batch(
            draws=tuple(draws),
            names=tuple(str(item.path) for item in items),
            captions=tuple(view.caption for view in views),
            weights_B=torch.tensor([self._weight(item) for item in items], dtype=torch.float32),
            latents=pictures if cached else None,
            pixels=None if cached else pictures,
            conditions=self._conditions(views),
            masks=_masks(held, 1 if cached else self._settings.latent_stride),
            sources=() if sources is None else tuple(view.source for view in views),
            source_latents=sources if cached else None,
            source_pixels=None if cached else sources,
            network_multiplier=items[0].dataset.network_multiplier,
            preserved=tuple(item.preserved for item in items),
        )

    def _places(self, start: int, stop: int) -> Iterator[tuple[int, int, tuple[Draw, ...]]]:
        for step in range(start, stop):
            for micro, micro_batch in enumerate(self._plan.step(step)):
                yield step, micro, micro_batch.parts[self._settings.rank]

    def _at(self, place: tuple[int, int, tuple[Draw, ...]]) -> tuple[int, int, Batch]:
        step, micro, draws = place
        batch = self.batch(draws)
        return step, micro, self._fetchable(self._complete(batch) if draws else batch)

    def _fetchable(self, batch: Batch) -> Batch:
        """Put a batch's tensors where a GPU can fetch them without anyone waiting, if it goes to one."""
        return batch.map(Tensor.pin_memory) if self._settings.device.type == "cuda" else batch

    def _view(self, draw: Draw) -> _View:
        item = self._manifest.items[draw.item]
        key = None if item.held_out else draw.key(self._settings.seed)
        flip = key is not None and is_flipped(item, key)
        source = drawn_source(item, key, flip=flip, dropout=self._settings.source_dropout)
        return _View(item, self._caption(item, draw), key, flip, source)

    def _picture(self, view: _View) -> _Picture:
        if self._caches.latents:
            kept = self._caches.latents.get(view.item, flip=view.flip)
            source = kept.source if view.source else None
            return _Picture(kept.picture.float(), kept.mask, None if source is None else source.float())
        pixels, mask_HW = load_pixels(view.item, view.key, flip=view.flip)
        mask = None if mask_HW is None else mask_to_latent_size(mask_HW, self._settings.latent_stride)
        source = pixels_to_tensor(load_source(view.source)) if view.source else None
        return _Picture(pixels_to_tensor(pixels), mask, source)

    def _caption(self, item: Item, draw: Draw) -> str:
        """With cached features a caption is one of the cached variants; without, draws are unlimited."""
        return draw_caption(
            item,
            seed=self._settings.seed,
            epoch=draw.epoch,
            repeat=draw.repeat,
            step=draw.step,
            total_steps=self._settings.total_steps,
            max_variants=self._caches.texts.max_variants if self._caches.texts else None,
        )

    def _conditions(self, views: Sequence[_View]) -> tuple[Condition, ...] | None:
        texts = self._caches.texts
        if texts is None:
            return None
        return tuple(texts.condition(view.item, view.caption, view.source) for view in views)

    def _weight(self, item: Item) -> float:
        return self._settings.prior_loss_weight if item.subset.is_reg else 1.0


def _masks(pictures: Sequence[_Picture], stride: int) -> tuple[Tensor, ...] | None:
    """Return a mask (h, w) for each picture, or None if no picture has one; without one it is wanted whole.

    Args:
        stride: what a side of such a picture is divided by to have that of the latents.
    """
    if all(each.mask is None for each in pictures):
        return None
    sizes = [(each.picture.shape[1] // stride, each.picture.shape[2] // stride) for each in pictures]
    return tuple(
        torch.ones(size) if each.mask is None else each.mask
        for each, size in zip(pictures, sizes, strict=True)
    )
