"""The passes that fill the caches: latents of pictures, features of captions.

A pass finds out what is missing, and only then has the model loaded. Three things happen at once: threads
decode the pictures of the next batches, this thread runs the encoder, and another thread writes what came
out; see `library.training.cache_pass`.

The largest pictures and the longest texts come first: what does not fit into memory shows at once, and memory
that was got for them does for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from library.core.ahead import map_ahead
from library.core.log import logger
from library.core.stopwatch import Stopwatch
from library.data.batch import Condition
from library.data.cached import FLIPPED, LatentCache, Tensors, TextCache
from library.data.images import drawn_source, load_pixels, load_source
from library.data.items import Item
from library.data.prompt import Prompt
from library.data.tensors import mask_to_latent_size, pixels_to_tensor
from library.training.cache_pass import Counts, Job, Outputs, PassRun, fill

EncodePictures = Callable[[Tensor], Tensor]  # pixels (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w)
EncodeTexts = Callable[[list[Prompt]], list[Condition]]
Thing = TypeVar("Thing")

_log = logger("caching")


def cache_latents(
    cache: LatentCache, items: Iterable[Item], load_encoder: Callable[[], EncodePictures], run: PassRun
) -> Counts:
    """Make sure that `cache` has the latents of all `items`, and what else is kept with them.

    That is the same flipped, masks, and the latents of the pictures that they are edits of.

    Args:
        load_encoder: loads the autoencoder; called only if an entry is missing or damaged.

    Raises:
        NonFiniteError: a picture's latents contain NaN or infinity; they are not kept.
        DataError: a picture cannot be read.
        StorageError: an entry cannot be written.
    """
    jobs = [Job(cache.key(item), cache.entries.store(item), str(item.path), item) for item in items]
    jobs.sort(key=_largest_first)

    def outputs(missing: list[Job], watch: Stopwatch) -> Outputs:
        with watch.time("load"):
            encode = load_encoder()
        return _encode_pictures(missing, encode, cache.entries.place.torch_dtype, (run, watch))

    return fill("latents", cache.entries, jobs, outputs, run)


def cache_texts(
    cache: TextCache,
    items: Iterable[Item],
    load_encoder: Callable[[], EncodeTexts],
    run: PassRun,
    *,
    length: Callable[[str], int] = len,
) -> Counts:
    """Make sure that `cache` has the features of everything that the captions of `items` can become.

    Args:
        load_encoder: loads the text encoder; called only if an entry is missing or damaged.
        length: how long the encoder finds a text. Prompts of about the same length go through it together,
            and so do those with a source of the same size.

    Raises:
        NonFiniteError: a text's features contain NaN or infinity; they are not kept.
        StorageError: an entry cannot be written.
    """
    prompts = [(item, cache.prompts(item)) for item in items]
    _say_what_is_sampled([len({p.text for p in of_item}) for _, of_item in prompts], cache.max_variants)
    jobs = [
        Job(cache.key(prompt), cache.entries.store(item), _called(prompt), item, prompt)
        for item, of_item in prompts
        for prompt in of_item
    ]
    # In this order processes get as much to do as each other.
    jobs.sort(key=lambda job: _longest_first(job.prompt, len))

    def outputs(missing: list[Job], watch: Stopwatch) -> Outputs:
        with watch.time("load"):
            encode = load_encoder()
        longest_first = sorted(missing, key=lambda job: _longest_first(job.prompt, length))
        return _encode_texts(longest_first, encode, cache.entries.place.torch_dtype, (run, watch))

    return fill("texts", cache.entries, jobs, outputs, run)


def _say_what_is_sampled(counts: list[int], limit: int) -> None:
    """Tell when captions may become more texts than are kept, so that nothing is lost silently."""
    many = sum(count >= limit for count in counts)
    if many:
        _log.info(
            "texts: %d of %d captions reach --max_caption_variants %d; training draws among so many of each",
            many,
            len(counts),
            limit,
        )


def _bucket(job: Job) -> tuple[int, int]:
    return job.item.geometry.bucket


def _largest_first(job: Job) -> tuple[int, tuple[int, int]]:
    width, height = _bucket(job)
    return -width * height, (width, height)


def _batches(things: Iterable[Thing], size: int) -> Iterator[list[Thing]]:
    iterator = iter(things)
    while batch := list(islice(iterator, size)):
        yield batch


# --- pictures ---


@dataclass(frozen=True)
class _Decoded:
    """A picture on its way to the encoder, and its source; pixels in [-1, 1], mask_HW in 0..1."""

    job: Job
    pixels_3HW: Tensor
    mask_HW: np.ndarray | None
    source_3HW: Tensor | None

    @property
    def flips(self) -> bool:
        """Whether it is wanted mirrored too."""
        return self.job.item.subset.images.flip_aug


@dataclass(frozen=True)
class _PictureBatch:
    """Pictures of one bucket, together as the encoder takes them, and the sources of those that have one."""

    pictures: list[_Decoded]
    pixels_B3HW: Tensor
    sources_S3HW: Tensor | None


def _decode(watch: Stopwatch, job: Job) -> _Decoded:
    with watch.time("decode"):
        pixels, mask = load_pixels(job.item, None, flip=False)
        source = drawn_source(job.item, None, flip=False)
        source_3HW = None if source is None else pixels_to_tensor(load_source(source))
        return _Decoded(job, pixels_to_tensor(pixels), mask, source_3HW)


def _put_together(pinned: bool, pictures: list[_Decoded]) -> _PictureBatch:
    def stacked(pixels: list[Tensor]) -> Tensor:
        return torch.stack(pixels).pin_memory() if pinned else torch.stack(pixels)

    sources = [picture.source_3HW for picture in pictures if picture.source_3HW is not None]
    pixels_B3HW = stacked([picture.pixels_3HW for picture in pictures])
    return _PictureBatch(pictures, pixels_B3HW, stacked(sources) if sources else None)


def _encode_pictures(
    jobs: list[Job], encode: EncodePictures, dtype: torch.dtype, how: tuple[PassRun, Stopwatch]
) -> Outputs:
    """Yield each job with its entry. `jobs` are sorted by bucket; a batch is of one bucket."""
    run, watch = how
    ahead = 2 * run.batch_size + run.threads
    decoded = map_ahead(partial(_decode, watch), jobs, threads=run.threads, ahead=ahead)
    groups = groupby(decoded, key=lambda picture: _bucket(picture.job))
    lists = (batch for _, pictures in groups for batch in _batches(pictures, run.batch_size))
    one_thread = min(1, run.threads)
    batches = map_ahead(partial(_put_together, run.device.type == "cuda"), lists, threads=one_thread, ahead=1)
    with closing(decoded), closing(batches):
        while True:
            with watch.time("wait"):
                batch = next(batches, None)
            if batch is None:
                return
            with watch.time("encode"):
                entries = _encode_batch(batch, encode, dtype)
            yield from zip((picture.job for picture in batch.pictures), entries, strict=True)


@torch.no_grad()
def _encode_batch(batch: _PictureBatch, encode: EncodePictures, dtype: torch.dtype) -> list[Tensors]:
    entries: list[Tensors] = [{} for _ in batch.pictures]

    def add(name: str, pixels_B3HW: Tensor, places: list[int]) -> None:
        for place, latents_Chw in zip(places, encode(pixels_B3HW).to(dtype).cpu(), strict=True):
            entries[place][name] = latents_Chw
        flipped = [row for row, place in enumerate(places) if batch.pictures[place].flips]
        if flipped:
            latents_BChw = encode(pixels_B3HW[flipped].flip(-1)).to(dtype).cpu()
            for row, latents_Chw in zip(flipped, latents_BChw, strict=True):
                entries[places[row]][name + FLIPPED] = latents_Chw

    add("latents", batch.pixels_B3HW, list(range(len(entries))))
    if batch.sources_S3HW is not None:
        edited = [place for place, p in enumerate(batch.pictures) if p.source_3HW is not None]
        add("source", batch.sources_S3HW, edited)
    for picture, entry in zip(batch.pictures, entries, strict=True):
        if picture.mask_HW is not None:
            stride = picture.pixels_3HW.shape[-1] // entry["latents"].shape[-1]
            entry["mask"] = mask_to_latent_size(picture.mask_HW, stride)
            if "latents" + FLIPPED in entry:
                entry["mask" + FLIPPED] = mask_to_latent_size(picture.mask_HW[:, ::-1], stride)
    return entries


# --- texts ---


def _called(prompt: Prompt) -> str:
    """What a prompt is called in messages and in its entry."""
    return prompt.text if prompt.source is None else f"{prompt.text} (with {prompt.source.path.name})"


def _longest_first(prompt: Prompt, length: Callable[[str], int]) -> tuple[int, tuple[int, int], int]:
    """Sort key: a source has many more tokens than a text, and more the larger it is."""
    size = (0, 0) if prompt.source is None else prompt.source.geometry.bucket
    return -size[0] * size[1], size, -length(prompt.text)


def _encode_texts(
    jobs: list[Job], encode: EncodeTexts, dtype: torch.dtype, how: tuple[PassRun, Stopwatch]
) -> Outputs:
    """Yield each job with its entry."""
    run, watch = how
    for batch in _batches(jobs, run.batch_size):
        with torch.no_grad(), watch.time("encode"):
            conditions = encode([job.prompt for job in batch])
        for job, condition in zip(batch, conditions, strict=True):
            tensors = condition.to_tensors()
            # A copy, because an unpadded condition may be a view that would keep its whole padded batch in
            # memory.
            yield job, {name: t.to("cpu", dtype, copy=True) for name, t in tensors.items()}
