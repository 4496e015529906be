"""The passes that fill the caches: latents of pictures, features of captions.

A pass finds out what is missing, and only then has the model loaded. Three things happen at once: threads
decode the pictures of the next batches, this thread runs the encoder, and another thread writes what came
out. Entries appear one by one and complete, so a pass that is killed goes on where it was.

The largest pictures and the longest texts come first: what does not fit into memory shows at once, and memory
that was got for them does for the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from library.core.ahead import Behind, map_ahead
from library.core.errors import NonFiniteError
from library.core.log import logger
from library.core.stopwatch import Stopwatch
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

SHARED_AT_ONCE = 32  # entries that a process hands to the others in one exchange: some tens of MB

_log = logger("caching")


def _go_on() -> None:
    """The barrier of a run with one process."""


def _keep_to_itself(mine: bytes) -> list[bytes]:
    """The exchange of a run with one process."""
    return [mine]


@dataclass(frozen=True)
class PassRun:
    """How a pass is carried out.

    `rank` and `world` share the work out: each process makes its own part, then all meet at `barrier`.
    Entries in memory are handed round by `exchange`, which returns every process's bytes, so that in the end
    each has all of them. Without `check` an entry on disk counts as good if its file is there. With `pinned`,
    pixels lie where a GPU can fetch them fastest.
    """

    batch_size: int
    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = _go_on
    exchange: Callable[[bytes], list[bytes]] = _keep_to_itself
    threads: int = min(8, os.cpu_count() or 1)
    check: bool = True
    pinned: bool = False


@dataclass(frozen=True)
class Counts:
    """What this process's part of a pass found, what it encoded, and how long each stage of that took.

    The stages in `watch`: "all", and in it "load", "encode" and "wait" (for pictures, for the disk), which
    follow each other; "decode" and "write" are done by other threads meanwhile.
    """

    cached: int
    encoded: int
    watch: Stopwatch = field(default_factory=Stopwatch, compare=False)


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
    jobs.sort(key=_largest_first)

    def outputs(missing: list[_Job], watch: Stopwatch) -> Outputs:
        with watch.time("load"):
            encode = load_encoder()
        return _encode_pictures(missing, encode, source.entries.place.torch_dtype, (run, watch))

    return _fill("latents", source.entries, jobs, outputs, run)


def cache_texts(
    source: TextSource,
    items: Iterable[Item],
    load_encoder: Callable[[], EncodeTexts],
    run: PassRun,
    *,
    prompts: Sequence[str] = (),
    length: Callable[[str], int] = len,
) -> Counts:
    """Make sure that `source` has the features of every text that the captions of `items` can become.

    Args:
        load_encoder: loads the text encoder; called only if an entry is missing or damaged.
        prompts: further texts, as the encoder is given them (for previews). They are kept with the first
            item's entries, and in memory.
        length: how long the encoder finds a text; texts of about the same length go through it together.

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
    jobs.sort(key=lambda job: len(job.about))  # so that processes get as much to do as each other

    def outputs(missing: list[_Job], watch: Stopwatch) -> Outputs:
        with watch.time("load"):
            encode = load_encoder()
        longest_first = sorted(missing, key=lambda job: -length(job.about))
        return _encode_texts(longest_first, encode, source.entries.place.torch_dtype, (run, watch))

    counts = _fill("texts", source.entries, jobs, outputs, run)
    for key in map(source.key, prompts):
        source.entries.memory[key] = source.entries.get(items[0], key)
    return counts


def _fill(
    what: str,
    entries: Entries,
    jobs: list[_Job],
    outputs: Callable[[list[_Job], Stopwatch], Outputs],
    run: PassRun,
) -> Counts:
    """Have what is missing encoded and kept, and wait for the processes that do the other parts."""
    all_jobs = _unique(jobs)
    jobs = all_jobs[run.rank :: run.world]
    found = map_ahead(partial(_find, entries, run.check), jobs, threads=run.threads, ahead=16 * run.threads)
    missing = [job for job, is_there in zip(jobs, found, strict=True) if not is_there]
    _log.info("%s: %d in the cache, %d to encode", what, len(jobs) - len(missing), len(missing))
    counts = Counts(len(jobs) - len(missing), len(missing))
    try:
        if missing:
            bar = tqdm(total=len(missing), desc=f"encoding {what}", disable=run.rank != 0)
            with bar, counts.watch.time("all"):
                _keep(outputs(missing, counts.watch), entries, run, (bar, counts.watch))
            _log.info("%s: %s", what, _pace(counts))
    finally:
        entries.remember()
    if not entries.place.to_disk:
        _hand_round(entries, [job.key for job in jobs], len(all_jobs), run)
    run.barrier()
    return counts


def _pace(counts: Counts) -> str:
    """Say how fast a pass was, and what of its time each stage had."""
    seconds = counts.watch.seconds
    loading = seconds("load")
    busy = seconds("all") - loading
    shares = {
        "in the encoder": seconds("encode"),
        "waiting for other threads": seconds("wait"),
        "decoding": seconds("decode"),
        "writing": seconds("write"),
    }
    told = ", ".join(f"{spent / busy:.1%} {what}" for what, spent in shares.items() if spent)
    return (
        f"{counts.encoded} encoded in {busy:.1f} s, {counts.encoded / busy:.2f} a second, after "
        f"{loading:.1f} s of loading; {told}"
    )


def _find(entries: Entries, check: bool, job: _Job) -> bool:
    """Say whether an entry is there and (with `check`) whole; in memory mode, fetch it."""
    if entries.place.to_disk:
        return job.store.check(job.key) if check else job.store.path(job.key).is_file()
    tensors = job.store.find(job.key)
    if tensors is not None:
        entries.memory[job.key] = tensors
    return tensors is not None


def _keep(outputs: Outputs, entries: Entries, run: PassRun, told: tuple[tqdm, Stopwatch]) -> None:
    """Store outputs as they come, while the next ones are computed."""
    bar, watch = told
    with closing(outputs), Behind(limit=4 * run.batch_size) as writer:
        for job, tensors in outputs:
            _require_finite(job, tensors)
            if entries.place.to_disk:
                with watch.time("wait"):
                    writer.submit(partial(_write, job, tensors, watch))
            else:
                entries.memory[job.key] = tensors
            bar.update()


def _write(job: _Job, tensors: Tensors, watch: Stopwatch) -> None:
    with watch.time("write"):
        job.store.write(job.key, tensors, job.about)


def _hand_round(entries: Entries, mine: list[str], total: int, run: PassRun) -> None:
    """Give the entries that this process has in memory to the others, and take theirs.

    All processes exchange equally often, also those whose part of the `total` is one entry smaller.
    """
    if run.world == 1:
        return
    for start in range(0, -(-total // run.world), SHARED_AT_ONCE):
        part = {
            f"{key}/{name}": tensor.contiguous()
            for key in mine[start : start + SHARED_AT_ONCE]
            for name, tensor in entries.memory[key].items()
        }
        contents = run.exchange(save(part))
        for content in (*contents[: run.rank], *contents[run.rank + 1 :]):
            for path, tensor in load(content).items():
                key, _, name = path.partition("/")
                entries.memory.setdefault(key, {})[name] = tensor


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


def _largest_first(job: _Job) -> tuple[int, tuple[int, int]]:
    width, height = _bucket(job)
    return -width * height, (width, height)


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


@dataclass(frozen=True)
class _PictureBatch:
    """Pictures of one bucket, together as the encoder takes them."""

    pictures: list[_Decoded]
    pixels_B3HW: Tensor


def _decode(watch: Stopwatch, job: _Job) -> _Decoded:
    with watch.time("decode"):
        pixels, mask = load_pixels(job.item, None, flip=False)
        return _Decoded(job, pixels_to_tensor(pixels), mask)


def _put_together(pinned: bool, pictures: list[_Decoded]) -> _PictureBatch:
    pixels_B3HW = torch.stack([picture.pixels_3HW for picture in pictures])
    return _PictureBatch(pictures, pixels_B3HW.pin_memory() if pinned else pixels_B3HW)


def _encode_pictures(
    jobs: list[_Job], encode: EncodePictures, dtype: torch.dtype, how: tuple[PassRun, Stopwatch]
) -> Outputs:
    """Yield each job with its entry. `jobs` are sorted by bucket; a batch is of one bucket."""
    run, watch = how
    ahead = 2 * run.batch_size + run.threads
    decoded = map_ahead(partial(_decode, watch), jobs, threads=run.threads, ahead=ahead)
    groups = groupby(decoded, key=lambda picture: _bucket(picture.job))
    lists = (batch for _, pictures in groups for batch in _batches(pictures, run.batch_size))
    one_thread = min(1, run.threads)
    batches = map_ahead(partial(_put_together, run.pinned), lists, threads=one_thread, ahead=1)
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
    pixels_B3HW = batch.pixels_B3HW
    entries = [{"latents": latents_Chw} for latents_Chw in encode(pixels_B3HW).to(dtype).cpu()]
    flipped = [index for index, p in enumerate(batch.pictures) if p.job.item.subset.images.flip_aug]
    if flipped:
        latents_BChw = encode(pixels_B3HW[flipped].flip(-1)).to(dtype).cpu()
        for index, latents_Chw in zip(flipped, latents_BChw, strict=True):
            entries[index]["latents" + FLIPPED] = latents_Chw
    for picture, entry in zip(batch.pictures, entries, strict=True):
        if picture.mask_HW is not None:
            stride = picture.pixels_3HW.shape[-1] // entry["latents"].shape[-1]
            entry["mask"] = mask_to_latent_size(picture.mask_HW, stride)
            if "latents" + FLIPPED in entry:
                entry["mask" + FLIPPED] = mask_to_latent_size(picture.mask_HW[:, ::-1], stride)
    return entries


# --- texts ---


def _encode_texts(
    jobs: list[_Job], encode: EncodeTexts, dtype: torch.dtype, how: tuple[PassRun, Stopwatch]
) -> Outputs:
    """Yield each job with its entry."""
    run, watch = how
    for batch in _batches(jobs, run.batch_size):
        with torch.no_grad(), watch.time("encode"):
            conditions = encode([job.about for job in batch])
        for job, condition in zip(batch, conditions, strict=True):
            tensors = condition.to_tensors()
            # A copy, because an unpadded condition may be a view that would keep its whole padded batch in
            # memory.
            yield job, {name: t.to("cpu", dtype, copy=True) for name, t in tensors.items()}
