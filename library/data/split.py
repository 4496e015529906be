"""Which pictures are held out for validation: a share or a number of each dataset, and whole datasets.

A share and a number choose by a hash of each picture's content; a share holds out one at least. So the
choice stays when pictures are renamed, moved or sorted differently (with a share also when some are added),
and what is held out in one place is trained on in none: not as a copy, at another resolution, in another
dataset, or as a regularisation picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library.core.errors import DataError
from library.core.seeds import unit
from library.data.find import names_of
from library.data.items import Dataset, Item


@dataclass(frozen=True)
class Split:
    """Pictures to train on and, with `Item.held_out`, to validate on. `notes` tell what is in neither."""

    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()


def split(items: Sequence[Item], contents: Mapping[Path, str]) -> Split:
    """Hold out what the items' datasets and subsets ask for.

    Args:
        contents: the digest of each picture's bytes (`Item.digest` may have its mask in it, too).

    Raises:
        DataError: everything is held out; `validation_count` is more than there is.
    """
    given = {contents[item.path] for item in items if item.dataset.validation}
    chosen = _chosen([item for item in items if contents[item.path] not in given], contents)
    used, left_out = [], []
    for item in items:
        content = contents[item.path]
        if item.dataset.validation or (content in chosen and not item.subset.is_reg):
            used.append(replace(item, held_out=True))
        elif content in chosen or content in given:
            left_out.append(item)
        else:
            used.append(item)
    if not any(not item.held_out and not item.subset.is_reg for item in used):
        raise DataError("validation holds out all pictures, so there is nothing to train on: hold out fewer.")
    return Split(tuple(used), (*_copies(left_out), *_unused_seed(items)))


def held_out(content: str, share: float, seed: int | None) -> bool:
    """Whether a picture with this content is among the `share` (0..1) held out; None is seed 0."""
    return _place(content, seed) < share


def first_of(contents: Iterable[str], count: int, seed: int | None) -> frozenset[str]:
    """Return `count` of these contents, which a larger count adds to."""
    return frozenset(sorted(set(contents), key=lambda content: (_place(content, seed), content))[:count])


def _place(content: str, seed: int | None) -> float:
    return unit(seed or 0, "validation", content)


def _chosen(items: Sequence[Item], contents: Mapping[Path, str]) -> set[str]:
    """The contents held out by share or number. Regularisation pictures are never chosen themselves."""
    candidates = [item for item in items if not item.subset.is_reg]
    chosen = {
        contents[item.path]
        for item in candidates
        if held_out(contents[item.path], item.subset.validation_split, item.dataset.validation_seed)
    }
    shared = [item for item in candidates if item.subset.validation_split]
    if shared and not chosen:  # a small share of few pictures: the first that a larger one would hold out
        nearest = min(shared, key=lambda item: _place(contents[item.path], item.dataset.validation_seed))
        chosen = {contents[nearest.path]}
    for index in sorted({item.dataset_index for item in candidates if item.dataset.validation_count}):
        here = [item for item in candidates if item.dataset_index == index]
        chosen |= _counted({contents[item.path] for item in here}, here[0].dataset, index)
    return chosen


def _counted(contents: set[str], dataset: Dataset, index: int) -> frozenset[str]:
    count = dataset.validation_count
    if count > len(contents):
        raise DataError(
            f"validation_count of datasets[{index}] is {count}, but it has only {len(contents)} different "
            f"pictures to choose from; lower it."
        )
    return first_of(contents, count, dataset.validation_seed)


def _copies(left_out: Sequence[Item]) -> list[str]:
    """A sentence for each dataset of which pictures are not trained on, because others hold them out."""
    notes = []
    for index in sorted({item.dataset_index for item in left_out}):
        paths = [item.path for item in left_out if item.dataset_index == index]
        notes.append(
            f"datasets[{index}] has copies of pictures that are held out for validation; they are not "
            f"trained on: {names_of(paths)}."
        )
    return notes


def _unused_seed(items: Sequence[Item]) -> list[str]:
    """A sentence if a validation_seed has nothing to choose from."""
    trained = [item for item in items if not item.dataset.validation]
    choosing = any(item.dataset.validation_count or item.subset.validation_split for item in trained)
    if choosing or all(item.dataset.validation_seed is None for item in trained):
        return []
    return ["validation_seed has no effect: there is neither a validation_split nor a validation_count."]
