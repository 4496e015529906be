"""The passes that fill the caches: latents of pictures, features of captions.

A pass finds out what is missing, and only then has the model loaded. Three things happen at once: threads
decode the pictures of the next batches, this thread runs the encoder, and another thread writes what came
out. Entries appear one by one and complete, so a pass that is killed goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from library.core.ahead import Behind, map_ahead
from library.core.errors import NonFiniteError
from library.core.log import logger
from library.data.batch import Condition
from library.data.cache import CacheStore
from library.data.captions import caption_variants
from library.data.images import load_pixels
from library.data.items import Item
from library.data.sources import FLIPPED, Entries, LatentSource, Tensors, TextSource
from library.data.tensors import mask_to_latent_size, pixels_to_tensor

EncodePictures = Callable[[Tensor], Tensor]  # pixels (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w)
EncodeTexts = Callable[[list[str]], list[Condition]]
Thing = TypeVar("Thing")

_log = logger("caching")


def _go_on() -> None:
    """The barrier of a run with one process."""


@dataclass(frozen=True)
class PassRun:
    """How a pass is carried out.

    `rank` and `world` share the work out: with entries on disk each process makes its own part, then all meet
    at `barrier`. Entries in memory cannot be shared, so there each process makes them all. Without `check`
    an entry on disk counts as good if its file is there.
    """

    batch_size: int
    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = _go_on
    threads: int = min(8, os.cpu_count() or 1)
    check: bool = True


@dataclass(frozen=True)
class Counts:
    """What this process's part of a pass found, and what it encoded."""

    cached: int
    encoded: int


@dataclass(frozen=True)
class _Job:
    """An entry that should exist, for a picture or for a text; `about` is what it is called."""

    key: str
    store: CacheStore
    about: str
    item: Item


Outputs = Generator[tuple[_Job, Tensors], None, None]


def cache_latents(
    source: LatentSource, items: Iterable[Item], load_encoder: Callable[[], EncodePictures], run: PassRun
) -> Counts:
    """Make sure that `source` has the latents (flipped too, and masks, where asked for) of all `items`.

    Args:
        load_encoder: loads the autoencoder; called only if an entry is missing or damaged.

    Raises:
        NonFiniteError: a picture's latents contain NaN or infinity; they are not kept.
        DataError: a picture cannot be read.
        StorageError: an entry cannot be written.
    """
    jobs = [_Job(source.key(item), source.entries.store(item), str(item.path), item) for item in items]
    jobs.sort(key=_bucket)

    def outputs(missing: list[_Job]) -> Outputs:
        return _encode_pictures(missing, load_encoder(), source.entries.place.torch_dtype, run)

    return _fill("latents", source.entries, jobs, outputs, run)


def cache_texts(
    source: TextSource,
    items: Iterable[Item],
    load_encoder: Callable[[], EncodeTexts],
    run: PassRun,
    prompts: Sequence[str] = (),
) -> Counts:
    """Make sure that `source` has the features of every text that the captions of `items` can become.

    Args:
        load_encoder: loads the text encoder; called only if an entry is missing or damaged.
        prompts: further texts, as the encoder is given them (for previews). They are kept with the first
            item's entries, and in memory.

    Raises:
        NonFiniteError: a text's features contain NaN or infinity; they are not kept.
        StorageError: an entry cannot be written.
    """
    items = list(items)
    variants = [caption_variants(item, source.max_variants) for item in items]
    _say_what_is_sampled(variants, source.max_variants)
    texts = [(source.prompt_of(c), item) for item, cs in zip(items, variants, strict=True) for c in cs]
    texts += [(prompt, items[0]) for prompt in prompts]
    jobs = [_Job(source.key(text), source.entries.store(item), text, item) for text, item in texts]
    jobs.sort(key=_text_length)  # texts of about the same length go through the encoder together

    def outputs(missing: list[_Job]) -> Outputs:
        return _encode_texts(missing, load_encoder(), source.entries.place.torch_dtype, run)

    counts = _fill("texts", source.entries, jobs, outputs, run)
    for key in map(source.key, prompts):
        source.entries.memory[key] = source.entries.get(items[0], key)
    return counts


def _fill(
    what: str, entries: Entries, jobs: list[_Job], outputs: Callable[[list[_Job]], Outputs], run: PassRun
) -> Counts:
    """Have what is missing encoded and kept, and wait for the processes that do the other parts."""
    jobs = _unique(jobs)
    if entries.place.to_disk:
        jobs = jobs[run.rank :: run.world]
    found = map_ahead(partial(_find, entries, run.check), jobs, threads=run.threads, ahead=16 * run.threads)
    missing = [job for job, is_there in zip(jobs, found, strict=True) if not is_there]
    _log.info("%s: %d in the cache, %d to encode", what, len(jobs) - len(missing), len(missing))
    try:
        if missing:
            with tqdm(total=len(missing), desc=f"encoding {what}", disable=run.rank != 0) as bar:
                _keep(outputs(missing), entries, run, bar)
    finally:
        entries.remember()
    run.barrier()
    return Counts(len(jobs) - len(missing), len(missing))


def _find(entries: Entries, check: bool, job: _Job) -> bool:
    """Say whether an entry is there and (with `check`) whole; in memory mode, fetch it."""
    if entries.place.to_disk:
        return job.store.check(job.key) if check else job.store.path(job.key).is_file()
    tensors = job.store.find(job.key)
    if tensors is not None:
        entries.memory[job.key] = tensors
    return tensors is not None


def _keep(outputs: Outputs, entries: Entries, run: PassRun, bar: tqdm) -> None:
    """Store outputs as they come, while the next ones are computed."""
    with closing(outputs), Behind(limit=4 * run.batch_size) as writer:
        for job, tensors in outputs:
            _require_finite(job, tensors)
            if entries.place.to_disk:
                writer.submit(partial(job.store.write, job.key, tensors, job.about))
            else:
                entries.memory[job.key] = tensors
            bar.update()


def _require_finite(job: _Job, tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"Encoding gave NaN or infinity in the {name} of {job.about!r}, so it was not cached. Run "
                f"the encoder in a wider precision (fp32), or leave this one out."
            )


def _say_what_is_sampled(variants: list[tuple[str, ...]], limit: int) -> None:
    """Tell when captions may become more texts than are kept, so that nothing is lost silently."""
    many = sum(len(texts) >= limit for texts in variants)
    if many:
        _log.info(
            "texts: %d of %d captions reach --max_caption_variants %d; training draws among so many of each",
            many,
            len(variants),
            limit,
        )


def _unique(jobs: list[_Job]) -> list[_Job]:
    """Drop jobs for the same entry: copies of a picture, equal captions, a folder in two datasets."""
    return list({(job.store.directory, job.key): job for job in jobs}.values())


def _bucket(job: _Job) -> tuple[int, int]:
    return job.item.geometry.bucket


def _text_length(job: _Job) -> int:
    return len(job.about)


def _batches(things: Iterable[Thing], size: int) -> Iterator[list[Thing]]:
    iterator = iter(things)
    while batch := list(islice(iterator, size)):
        yield batch


# --- pictures ---


@dataclass(frozen=True)
class _Decoded:
    """A picture on its way to the encoder; pixels_3HW in [-1, 1], mask_HW in 0..1."""

    job: _Job
    pixels_3HW: Tensor
    mask_HW: np.ndarray | None


def _decode(job: _Job) -> _Decoded:
    pixels, mask = load_pixels(job.item, None, flip=False)
    return _Decoded(job, pixels_to_tensor(pixels), mask)


def _encode_pictures(jobs: list[_Job], encode: EncodePictures, dtype: torch.dtype, run: PassRun) -> Outputs:
    """Yield each job with its entry. `jobs` are sorted by bucket; a batch is of one bucket."""
    ahead = 2 * run.batch_size + run.threads
    with closing(map_ahead(_decode, jobs, threads=run.threads, ahead=ahead)) as decoded:
        for _, pictures in groupby(decoded, key=lambda picture: _bucket(picture.job)):
            for batch in _batches(pictures, run.batch_size):
                yield from zip((p.job for p in batch), _encode_batch(batch, encode, dtype), strict=True)


@torch.no_grad()
def _encode_batch(batch: list[_Decoded], encode: EncodePictures, dtype: torch.dtype) -> list[Tensors]:
    pixels_B3HW = torch.stack([picture.pixels_3HW for picture in batch])
    entries = [{"latents": latents_Chw} for latents_Chw in encode(pixels_B3HW).to(dtype).cpu()]
    flipped = [index for index, p in enumerate(batch) if p.job.item.subset.images.flip_aug]
    if flipped:
        latents_BChw = encode(pixels_B3HW[flipped].flip(-1)).to(dtype).cpu()
        for index, latents_Chw in zip(flipped, latents_BChw, strict=True):
            entries[index]["latents" + FLIPPED] = latents_Chw
    for picture, entry in zip(batch, entries, strict=True):
        if picture.mask_HW is not None:
            stride = picture.pixels_3HW.shape[-1] // entry["latents"].shape[-1]
            entry["mask"] = mask_to_latent_size(picture.mask_HW, stride)
            if "latents" + FLIPPED in entry:
                entry["mask" + FLIPPED] = mask_to_latent_size(picture.mask_HW[:, ::-1], stride)
    return entries


# --- texts ---


def _encode_texts(jobs: list[_Job], encode: EncodeTexts, dtype: torch.dtype, run: PassRun) -> Outputs:
    """Yield each job with its entry."""
    for batch in _batches(jobs, run.batch_size):
        with torch.no_grad():
            conditions = encode([job.about for job in batch])
        for job, condition in zip(batch, conditions, strict=True):
            tensors = condition.to_tensors()
            # A copy, because an unpadded condition may be a view that would keep its whole padded batch in
            # memory.
            yield job, {name: t.to("cpu", dtype, copy=True) for name, t in tensors.items()}
