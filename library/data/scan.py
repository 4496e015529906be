"""From checked datasets to a manifest: every picture found, decoded once, measured, and given its place.

Everything that is wrong is told at once. What was learnt of a picture is remembered by its content, so that a
second start decodes no picture.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from library.core.ahead import map_ahead
from library.core.errors import DataError
from library.core.files import explain
from library.core.hashing import HashLedger, sha256_text
from library.data.buckets import geometry, source_geometry
from library.data.facts import FactLedger
from library.data.find import Found, find, of_overlooked
from library.data.images import PictureFacts, face_in_name
from library.data.items import Dataset, Geometry, Item, Manifest, Source, Subset
from library.data.split import split

_THREADS = min(8, os.cpu_count() or 1)  # Pillow's decoders and the hash release the interpreter lock


@dataclass(frozen=True)
class _Use:
    """A picture of a dataset, as it was found; other datasets may use the same file."""

    dataset_index: int
    dataset: Dataset
    subset: Subset
    found: Found


@dataclass(frozen=True)
class _Decoded:
    """A file that decodes: the SHA-256 of its bytes, and what planning must know of the picture."""

    digest: str
    facts: PictureFacts


_Files = Mapping[Path, _Decoded | str]  # a str is a sentence about what is wrong with the file


def scan(datasets: Sequence[Dataset], *, skip_bad_images: bool, ledger: HashLedger) -> Manifest:
    """Look at everything that the datasets name.

    Args:
        skip_bad_images: leave out pictures that cannot be used, and list them in `Manifest.skipped`.
        ledger: remembers digests of files; what is known of pictures is kept beside it in `pictures.json`.

    Raises:
        DataError: pictures, masks, sources or captions that cannot be used, all named; a subset without
            pictures; validation that holds out everything, or more pictures than there are.
    """
    uses, problems, notes, warnings = _find_all(datasets)
    files = _decode_all(uses, ledger)
    items, bad = _measure(uses, files)
    if skip_bad_images:
        problems += _emptied(uses, items)
    elif bad:
        problems += [*bad, "Mend or remove these pictures, or leave them out with --skip_bad_images."]
    _raise_if_any(problems)
    notes += _missing_in_pictures(items, files)
    parts = split(items, {item.path: _usable(files[item.path]).digest for item in items})
    items, unused = _balance_regularisation(parts.items)
    ordered, numbered = _numbered(datasets, items)
    return Manifest(
        ordered,
        numbered,
        train=tuple(item.index for item in numbered if not item.held_out),
        validation=tuple(item.index for item in numbered if item.held_out),
        skipped=tuple(bad),
        warnings=tuple(warnings),
        notes=(*notes, *parts.notes, *unused),
    )


def _find_all(datasets: Sequence[Dataset]) -> tuple[list[_Use], list[str], list[str], list[str]]:
    """Return the uses of all pictures, what is wrong, what is worth telling, and worth a warning."""
    uses, problems, notes = [], [], []
    overlooked: dict[Path, Path] = {}
    for index, dataset in enumerate(datasets):
        seen = set()
        for subset in dataset.subsets:
            findings = find(subset)
            problems += findings.problems
            notes += findings.notes
            overlooked |= dict(findings.overlooked)
            for found in findings.found:
                if found.path in seen:
                    problems.append(
                        f"{found.path} is found twice in datasets[{index}]; it may be there only once."
                    )
                seen.add(found.path)
                uses.append(_Use(index, dataset, subset, found))
    warnings = of_overlooked(list(overlooked.items()))
    return uses, list(dict.fromkeys(problems)), list(dict.fromkeys(notes)), warnings


def _decode_all(uses: Sequence[_Use], ledger: HashLedger) -> _Files:
    """Decode all pictures, masks and sources whose content is not known yet."""
    facts = FactLedger(ledger.path.with_name("pictures.json"))

    def decode(path: Path) -> _Decoded | str:
        try:
            digest = ledger.sha256(path)
            return _Decoded(digest, facts.facts(path, digest))
        except OSError as error:
            return f"{path} cannot be read: {explain(error)}."
        except DataError as error:
            return str(error)

    found = [use.found for use in uses]
    named = [path for f in found for path in (f.path, f.mask_path, f.source_path) if path]
    paths = list(dict.fromkeys(named))
    try:
        decoded = map_ahead(decode, paths, threads=_THREADS, ahead=16 * _THREADS)
        told = tqdm(decoded, "checking pictures", total=len(paths), delay=2, unit="picture")
        return dict(zip(paths, told, strict=True))
    finally:
        ledger.save()
        facts.save()


def _measure(uses: Sequence[_Use], files: _Files) -> tuple[list[Item], list[str]]:
    """Return the usable pictures as items, and sentences about the others."""
    items, bad = [], []
    for use in uses:
        try:
            items.append(_item(use, files))
        except DataError as error:
            bad.append(str(error))
    return items, list(dict.fromkeys(bad))


def _item(use: _Use, files: _Files) -> Item:
    found = use.found
    picture = _usable(files[found.path])
    digest = picture.digest
    if found.mask_path:
        mask = _usable(files[found.mask_path])
        if mask.facts.size != picture.facts.size:
            sizes = [f"{width} x {height}" for width, height in (mask.facts.size, picture.facts.size)]
            raise DataError(f"The mask {found.mask_path} has {sizes[0]} pixels, its picture {sizes[1]}.")
        digest = sha256_text(picture.digest, mask.digest)
    try:
        place = geometry(picture.facts.size, use.dataset.buckets)
    except DataError as error:
        raise DataError(f"{found.path}: {error}.") from error
    return Item(
        index=-1,
        dataset=use.dataset,
        dataset_index=use.dataset_index,
        subset=use.subset,
        path=found.path,
        size=picture.facts.size,
        geometry=place,
        text=found.text,
        repeats=use.subset.num_repeats,
        digest=digest,
        mask_path=found.mask_path,
        source=_source_of(found, picture.facts, place, files),
    )


def _source_of(found: Found, target: PictureFacts, place: Geometry, files: _Files) -> Source | None:
    """Return the source of a picture that lands at `place`; what is wrong with it is wrong with the pair."""
    path = found.source_path
    if path is None:
        return None
    pair = f"It is the source of {found.path}, which cannot be trained without it."
    try:
        source = _usable(files[path])
    except DataError as error:
        raise DataError(f"{error} {pair}") from error
    try:
        own = source_geometry(source.facts.size, target.size, place)
    except DataError as error:
        raise DataError(f"{path}: {error}. {pair}") from error
    return Source(path, source.facts.size, own, source.digest)


def _usable(decoded: _Decoded | str) -> _Decoded:
    if isinstance(decoded, str):
        raise DataError(decoded)
    return decoded


def _emptied(uses: Sequence[_Use], items: Sequence[Item]) -> list[str]:
    """Sentences about subsets of which --skip_bad_images leaves nothing."""
    left = {id(item.subset) for item in items}
    emptied = {id(use.subset): use.subset for use in uses if id(use.subset) not in left}
    return [
        f"{_home(subset)} has no picture that can be used; the first: {next(_paths_of(subset, uses))}."
        for subset in emptied.values()
    ]


def _paths_of(subset: Subset, uses: Sequence[_Use]) -> Iterator[Path]:
    return (use.found.path for use in uses if use.subset is subset)


def _home(subset: Subset) -> Path | None:
    return subset.metadata_file or subset.image_dir


def _balance_regularisation(items: Sequence[Item]) -> tuple[list[Item], list[str]]:
    """Repeat each dataset's regularisation pictures so that an epoch has as many of them as of the others.

    The draws are dealt out in proportion to num_repeats. Where there are more pictures than draws, evenly
    spaced ones are used, and a sentence tells how many are not.
    """
    balanced, notes = [], []
    for index in sorted({item.dataset_index for item in items}):
        here = [item for item in items if item.dataset_index == index]
        trained = [item for item in here if not item.held_out]
        regular = [item for item in trained if item.subset.is_reg]
        draws = sum(item.repeats for item in trained if not item.subset.is_reg)
        shares = dict(zip(map(id, regular), _deal(draws, [item.repeats for item in regular]), strict=True))
        dealt = [replace(item, repeats=shares.get(id(item), item.repeats)) for item in here]
        balanced += [item for item in dealt if item.repeats > 0]
        unused = list(shares.values()).count(0)
        if unused:
            notes.append(
                f"{unused} of {len(regular)} regularisation pictures of datasets[{index}] are not used, "
                f"because an epoch has only {draws} pictures to train on."
            )
    return balanced, notes


def _numbered(
    datasets: Sequence[Dataset], items: Sequence[Item]
) -> tuple[tuple[Dataset, ...], tuple[Item, ...]]:
    """Put datasets for validation only last: where they stand in the file then cannot matter to training.

    Until here they are numbered as in the configuration, and so in messages.
    """
    order = sorted(range(len(datasets)), key=lambda index: datasets[index].validation)
    place = {index: number for number, index in enumerate(order)}
    moved = sorted(items, key=lambda item: place[item.dataset_index])
    return tuple(datasets[index] for index in order), tuple(
        replace(item, index=number, dataset_index=place[item.dataset_index])
        for number, item in enumerate(moved)
    )


def _deal(total: int, weights: Sequence[int]) -> list[int]:
    """Split `total` into whole shares in proportion to `weights`, spread evenly."""
    shares, dealt, weight_so_far = [], 0, 0
    for weight in weights:
        weight_so_far += weight
        upto = total * weight_so_far // sum(weights)
        shares.append(upto - dealt)
        dealt = upto
    return shares


def _missing_in_pictures(items: Sequence[Item], files: _Files) -> list[str]:
    """Sentences about options for which no picture of a subset has what they need."""
    notes = []
    for subset in {id(item.subset): item.subset for item in items}.values():
        paths = [item.path for item in items if item.subset is subset]
        if subset.images.alpha_mask and not any(_usable(files[path]).facts.has_alpha for path in paths):
            notes.append(f"alpha_mask masks nothing: no picture of {_home(subset)} has an alpha channel.")
        if subset.images.face_crop_aug_range and not any(map(face_in_name, paths)):
            notes.append(
                f"face_crop_aug_range does nothing: no file name of {_home(subset)} ends in a face's "
                f"_<x>_<y>_<width>_<height>."
            )
    return notes


def without_sources(manifest: Manifest) -> list[str]:
    """Sentences about what a model that edits pictures is trained on without a source."""
    notes = []
    for index, dataset in enumerate(manifest.datasets):
        for subset in dataset.subsets:
            if subset.source_dir is None:
                count = sum(item.subset is subset for item in manifest.items)
                notes.append(
                    f"{_home(subset)} (datasets[{index}]) has no conditioning_data_dir: its {count} pictures "
                    f"are trained from their captions alone, without a source picture"
                )
    return notes


def _raise_if_any(problems: Sequence[str]) -> None:
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        raise DataError("\n  ".join(["the pictures and captions cannot be used as they are:", *problems]))
