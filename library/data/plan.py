"""The order of data: which pictures go into which step, as a pure function of (manifest, seed, step).

An epoch uses each training item exactly `repeats` times. The items of one dataset and bucket are shuffled
(all once, then all that are repeated a second time, and so on), cut into global batches of `batch_size *
world`, and the batches of all buckets are shuffled together; `accumulation` of them make a step. Nothing is
carried from step to step, so a run can go on anywhere, and the number of workers cannot matter.

With a `TokenBudget` batches are not cut from buckets, but filled with pictures of any size, see
`library.data.token_batches`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Protocol

from library.core.seeds import rng
from library.data.items import Draw, Item, Manifest, MicroBatch, Size
from library.data.token_batches import TokenBudget, fill

Use = tuple[int, int]  # (item, repeat)
Parts = tuple[tuple[Use, ...], ...]  # of one batch, one for each process


class Plan:
    """The whole run's order of data. `seed`, `world` (processes) and `accumulation` are fixed for the run."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        seed: int,
        world: int = 1,
        accumulation: int = 1,
        budget: TokenBudget | None = None,
    ) -> None:
        """`budget`: fill batches with so many tokens, instead of `batch_size` pictures of a bucket."""
        self.manifest = manifest
        self.seed = seed
        self.world = world
        self.accumulation = accumulation
        self._cut: _Cut = _ByBucket(manifest, world) if budget is None else _ByTokens(manifest, world, budget)
        self._batches_of_epoch = lru_cache(maxsize=2)(self._shuffled_batches)
        self._made_step = lru_cache(maxsize=64)(self._make_step)  # the loader asks for it, and then the loop

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches (over all processes) in an epoch. Some may be smaller than others."""
        return self._cut.count

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch. The last one may have fewer micro-batches."""
        return math.ceil(self.batches_per_epoch / self.accumulation)

    @property
    def draws_per_epoch(self) -> int:
        """Pictures in an epoch, counted with their repeats."""
        return sum(self.manifest.items[index].repeats for index in self.manifest.train)

    @property
    def heaviest_batches(self) -> list[tuple[Size, ...]]:
        """The sizes of the pictures that one process has in batches than which no other has both more pixels
        and more pictures, each of which has a caption; the one with the most pixels first."""
        counted = {(sum(map(math.prod, sizes)), len(sizes)): sizes for sizes in self._cut.sizes()}
        found: list[tuple[Size, ...]] = []
        for (_, count), sizes in sorted(counted.items(), reverse=True):
            if not found or count > len(found[-1]):
                found.append(sizes)
        return found

    def step(self, step: int) -> tuple[MicroBatch, ...]:
        """Return the micro-batches of a step (from 0, over the whole run)."""
        return self._made_step(step)

    def _make_step(self, step: int) -> tuple[MicroBatch, ...]:
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.accumulation
        batches = self._batches_of_epoch(epoch)[first : first + self.accumulation]
        return tuple(self._drawn(parts, epoch, step, micro) for micro, parts in enumerate(batches))

    def _drawn(self, parts: Parts, epoch: int, step: int, micro: int) -> MicroBatch:
        """Return a batch with its slots numbered: first the first of each process, then the second."""
        rows = max(map(len, parts))
        places = [(row, rank) for row in range(rows) for rank, part in enumerate(parts) if row < len(part)]
        slots = {place: slot for slot, place in enumerate(places)}
        return MicroBatch(
            tuple(
                tuple(
                    Draw(item, repeat, epoch, step, micro, slots[row, rank])
                    for row, (item, repeat) in enumerate(part)
                )
                for rank, part in enumerate(parts)
            )
        )

    def _shuffled_batches(self, epoch: int) -> list[Parts]:
        batches = list(self._cut.batches(self.seed, epoch))
        rng(self.seed, "batches", epoch).shuffle(batches)
        return batches


class _Cut(Protocol):
    """How an epoch's pictures are cut into batches."""

    count: int  # batches of an epoch, the same in each

    def batches(self, seed: int, epoch: int) -> Iterator[Parts]:
        """Yield the batches of an epoch."""

    def sizes(self) -> Iterator[tuple[Size, ...]]:
        """Yield the sizes that a process's part of a batch can have."""


class _ByBucket:
    """Batches of `batch_size` pictures of one dataset and bucket."""

    def __init__(self, manifest: Manifest, world: int) -> None:
        self._manifest, self._world = manifest, world
        groups = defaultdict(list)
        for item in _trained(manifest):
            groups[item.dataset_index, item.geometry.bucket].append(item)
        self._groups = dict(sorted(groups.items()))
        self.count = sum(
            math.ceil(sum(item.repeats for item in items) / self._batch_size(dataset))
            for (dataset, _), items in self._groups.items()
        )

    def batches(self, seed: int, epoch: int) -> Iterator[Parts]:
        for (dataset, bucket), items in self._groups.items():
            uses = list(_shuffled_uses(items, seed, epoch, *bucket, dataset))
            size = self._batch_size(dataset)
            for start in range(0, len(uses), size):
                batch = uses[start : start + size]
                yield tuple(tuple(batch[rank :: self._world]) for rank in range(self._world))

    def sizes(self) -> Iterator[tuple[Size, ...]]:
        for dataset, bucket in self._groups:
            yield (bucket,) * self._manifest.datasets[dataset].batch_size

    def _batch_size(self, dataset: int) -> int:
        return self._manifest.datasets[dataset].batch_size * self._world


class _ByTokens:
    """Batches of at most `budget.limit` tokens a process. Pictures that share one share a multiplier too."""

    def __init__(self, manifest: Manifest, world: int, budget: TokenBudget) -> None:
        self._world, self._budget = world, budget
        groups: dict[float, dict[int, list[Item]]] = defaultdict(lambda: defaultdict(list))
        for item in _trained(manifest):
            tokens = budget.tokens(item.geometry.bucket)
            groups[item.dataset.network_multiplier][tokens].append(item)
        self._groups = [groups[multiplier] for multiplier in sorted(groups)]
        self._filled = [_filled(classes, budget.limit) for classes in self._groups]
        self.count = sum(math.ceil(len(batches) / world) for batches in self._filled)

    def batches(self, seed: int, epoch: int) -> Iterator[Parts]:
        for number, (classes, batches) in enumerate(zip(self._groups, self._filled, strict=True)):
            uses = {
                tokens: _shuffled_uses(items, seed, epoch, tokens, number)
                for tokens, items in classes.items()
            }
            parts = [tuple(next(uses[tokens]) for tokens in batch) for batch in batches]
            for start in range(0, len(parts), self._world):
                some = parts[start : start + self._world]
                yield tuple(some + [()] * (self._world - len(some)))

    def sizes(self) -> Iterator[tuple[Size, ...]]:
        for classes, batches in zip(self._groups, self._filled, strict=True):
            for batch in batches:
                yield tuple(classes[tokens][0].geometry.bucket for tokens in batch)


def _trained(manifest: Manifest) -> Iterator[Item]:
    """The training items, in an order that does not depend on how they were found."""
    return (manifest.items[index] for index in manifest.train)


def _filled(classes: dict[int, list[Item]], limit: int) -> list[list[int]]:
    """Return the numbers of tokens in each batch of an epoch."""
    repeated = (tokens for tokens, items in classes.items() for item in items for _ in range(item.repeats))
    return fill(repeated, limit)


def _shuffled_uses(items: Sequence[Item], seed: int, epoch: int, *group: int) -> Iterator[Use]:
    for repeat in range(max(item.repeats for item in items)):
        again = [item.index for item in items if item.repeats > repeat]
        rng(seed, "order", epoch, *group, repeat).shuffle(again)
        yield from ((index, repeat) for index in again)
