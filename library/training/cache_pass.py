"""The frame of a pass that fills a cache: what is missing is encoded, kept, and handed round.

Entries appear one by one and complete, so a pass that is killed goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import torch
from safetensors.torch import load, save
from tqdm import tqdm

from library.core.ahead import Behind, map_ahead
from library.core.device import forget_peak_memory, peak_memory_bytes
from library.core.errors import NonFiniteError
from library.core.log import logger
from library.core.stopwatch import Stopwatch
from library.data.cache import CacheStore
from library.data.cached import Entries, Tensors
from library.data.items import Item
from library.data.prompt import Prompt

WAITING_AT_MOST = 64  # entries that wait to be written; more keep the encoder waiting instead
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
    each has all of them. Without `check` an entry on disk counts as good if its file is there. `device` is
    the encoder's: a GPU gets pixels from where it can fetch them fastest, and its memory is what is told of.
    """

    batch_size: int
    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = _go_on
    exchange: Callable[[bytes], list[bytes]] = _keep_to_itself
    threads: int = min(8, os.cpu_count() or 1)
    check: bool = True
    device: torch.device = torch.device("cpu")


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
class Job:
    """An entry that should exist, for a picture or for a prompt; `about` is what it is called."""

    key: str
    store: CacheStore
    about: str
    item: Item
    prompt: Prompt = Prompt("")


Outputs = Generator[tuple[Job, Tensors], None, None]


def fill(
    what: str,
    entries: Entries,
    jobs: list[Job],
    outputs: Callable[[list[Job], Stopwatch], Outputs],
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
            forget_peak_memory(run.device)
            bar = tqdm(total=len(missing), desc=f"encoding {what}", disable=run.rank != 0)
            with bar, counts.watch.time("all"):
                _keep(outputs(missing, counts.watch), entries, run, (bar, counts.watch))
            _log.info("%s: %s; %s", what, _pace(counts), _peak(run.device))
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


def _peak(device: torch.device) -> str:
    """Say how much memory a pass took at most."""
    peak = peak_memory_bytes(device) / 2**30
    if device.type == "cuda":
        return f"at most {peak:.2f} GiB of the GPU's memory"
    # The system counts a process's memory from its start only.
    return f"this process has had at most {peak:.2f} GiB of memory so far"


def _find(entries: Entries, check: bool, job: Job) -> bool:
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
    with closing(outputs), Behind(limit=min(4 * run.batch_size, WAITING_AT_MOST)) as writer:
        for job, tensors in outputs:
            _require_finite(job, tensors)
            if entries.place.to_disk:
                with watch.time("wait"):
                    writer.submit(partial(_write, job, tensors, watch))
            else:
                entries.memory[job.key] = tensors
            bar.update()


def _write(job: Job, tensors: Tensors, watch: Stopwatch) -> None:
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


def _require_finite(job: Job, tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"Encoding gave NaN or infinity in the {name} of {job.about!r}, so it was not cached. Run "
                f"the encoder in a wider precision (fp32), or leave this one out."
            )


def _unique(jobs: list[Job]) -> list[Job]:
    """Drop jobs for the same entry: copies of a picture, equal captions, a folder in two datasets."""
    return list({(job.store.directory, job.key): job for job in jobs}.values())
