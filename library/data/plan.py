"""The order of data: which pictures go into which step, as a pure function of (manifest, seed, step).

An epoch uses each training item exactly `repeats` times. The items of one dataset and bucket are shuffled
(all once, then all that are repeated a second time, and so on), cut into global batches of `batch_size *
world`, and the batches of all buckets are shuffled together; `accumulation` of them make a step. Nothing is
carried from step to step, so a run can go on anywhere, and the number of workers cannot matter.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache

from library.core.seeds import rng
from library.data.items import Draw, Item, Manifest, MicroBatch, Size

Group = tuple[int, Size]  # (dataset, bucket): what may share a batch
Use = tuple[int, int]  # (item, repeat)


class Plan:
    """The whole run's order of data. `seed`, `world` (processes) and `accumulation` are fixed for the run."""

    def __init__(self, manifest: Manifest, *, seed: int, world: int = 1, accumulation: int = 1) -> None:
        self.manifest = manifest
        self.seed = seed
        self.world = world
        self.accumulation = accumulation
        self._groups = _groups(manifest)
        self._batches_of_epoch = lru_cache(maxsize=2)(self._shuffled_batches)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches (over all processes) in an epoch. A bucket's last one may be smaller."""
        return sum(
            math.ceil(sum(item.repeats for item in items) / self._batch_size(group))
            for group, items in self._groups.items()
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch. The last one may have fewer micro-batches."""
        return math.ceil(self.batches_per_epoch / self.accumulation)

    @property
    def draws_per_epoch(self) -> int:
        """Pictures in an epoch, counted with their repeats."""
        return sum(item.repeats for items in self._groups.values() for item in items)

    def epoch_of(self, step: int) -> int:
        """Return the epoch, from 0, that a step (from 0) belongs to."""
        return step // self.steps_per_epoch

    def step(self, step: int) -> tuple[MicroBatch, ...]:
        """Return the micro-batches of a step (from 0, over the whole run)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.accumulation
        batches = self._batches_of_epoch(epoch)[first : first + self.accumulation]
        return tuple(
            MicroBatch(
                tuple(
                    Draw(item, repeat, epoch, step, micro, slot) for slot, (item, repeat) in enumerate(uses)
                )
            )
            for micro, uses in enumerate(batches)
        )

    def _shuffled_batches(self, epoch: int) -> list[list[Use]]:
        batches = []
        for group, items in self._groups.items():
            uses, size = list(_shuffled_uses(items, self.seed, epoch, group)), self._batch_size(group)
            batches += [uses[start : start + size] for start in range(0, len(uses), size)]
        rng(self.seed, "batches", epoch).shuffle(batches)
        return batches

    def _batch_size(self, group: Group) -> int:
        return self.manifest.datasets[group[0]].batch_size * self.world


def _groups(manifest: Manifest) -> dict[Group, list[Item]]:
    """The training items by dataset and bucket, in an order that does not depend on how they were found."""
    groups = defaultdict(list)
    for index in manifest.train:
        item = manifest.items[index]
        groups[item.dataset_index, item.geometry.bucket].append(item)
    return dict(sorted(groups.items()))


def _shuffled_uses(items: list[Item], seed: int, epoch: int, group: Group) -> Iterator[Use]:
    for repeat in range(max(item.repeats for item in items)):
        again = [item.index for item in items if item.repeats > repeat]
        rng(seed, "order", epoch, *group[1], group[0], repeat).shuffle(again)
        yield from ((index, repeat) for index in again)
