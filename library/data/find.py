"""Pictures with their captions, masks and sources, found on the disk. Nothing is decoded here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from library.core.errors import ConfigError
from library.core.files import read_text
from library.data.folders import PICTURE_ENDINGS, pictures_in
from library.data.images import face_in_name
from library.data.items import Subset
from library.data.metadata_file import read_entries

_NAMED = 10  # how many of many files a message names
_USUAL_CAPTION_ENDINGS = (".txt", ".caption")


@dataclass(frozen=True)
class Found:
    """A picture of a subset, the text beside it (all lines), its mask, and the picture it is an edit of."""

    path: Path
    text: str
    mask_path: Path | None = None
    source_path: Path | None = None


@dataclass
class Findings:
    """What a subset holds. `problems` stop the run once all pictures are checked; `notes` are to be told.

    overlooked: pictures that take the class tokens, each with a caption file of another ending beside it.
    """

    found: list[Found] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    overlooked: list[tuple[Path, Path]] = field(default_factory=list)


def find(subset: Subset) -> Findings:
    """Return a subset's pictures in the order of their names, or of its metadata file.

    Raises:
        ConfigError, DataError: the metadata file or the folder cannot be read.
    """
    findings = Findings()
    if subset.metadata_file:
        _find_by_metadata(subset, findings)
    else:
        _find_by_folder(subset, findings)
    if not findings.found and not findings.problems:
        findings.problems.append(_nothing_found(subset))
    _note_unused_lines(subset, findings)
    return findings


def of_overlooked(overlooked: Sequence[tuple[Path, Path]]) -> list[str]:
    """Return one sentence about all pictures of `Findings.overlooked`, or none."""
    if not overlooked:
        return []
    picture, caption = overlooked[0]
    return [
        f"class tokens stand in for the captions of {_pictures(len(overlooked))} beside which lie files of "
        f"another ending, such as {caption.name} beside {picture}. If those are the captions, give "
        f'--caption_extension {caption.suffix}, or in a TOML caption_extension = "{caption.suffix}".'
    ]


def names_of(paths: Sequence[Path]) -> str:
    """Return file names for a message, the first ten of them."""
    names = ", ".join(path.name for path in paths[:_NAMED])
    return names + (f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else "")


def _find_by_metadata(subset: Subset, findings: Findings) -> None:
    entries, findings.problems = read_entries(subset)
    silent = [entry.path for entry in entries if entry.text is None]
    if silent:
        findings.problems.append(
            f'{_pictures(len(silent))} in {subset.metadata_file} with neither "caption" nor "tags": '
            f'{names_of(silent)}. Write "caption": "" to train one without a caption.'
        )
    sources = _sources(subset, [entry.path for entry in entries], findings)
    findings.found = [
        Found(entry.path, entry.text or "", source_path=sources.get(entry.path)) for entry in entries
    ]


def _find_by_folder(subset: Subset, findings: Findings) -> None:
    pictures = list(pictures_in(subset.image_dir, recursive=subset.recursive))
    masks = _masks(subset, pictures, findings)
    sources = _sources(subset, pictures, findings)
    silent = []
    for path in pictures:
        text = _text_beside(path, subset, findings)
        if text is None:
            text = subset.class_tokens
            findings.overlooked += _overlooked(path, subset)
        if text is None:
            silent.append(path)
        findings.found.append(Found(path, text or "", masks.get(path), sources.get(path)))
    if silent:
        findings.problems.append(_no_caption(subset, silent))


def _text_beside(path: Path, subset: Subset, findings: Findings) -> str | None:
    for file in _caption_files(path, subset):
        if file.is_file():
            try:
                return read_text(file, "The caption file").strip()
            except ConfigError as error:
                findings.problems.append(str(error))
                return ""
    return None


def _overlooked(path: Path, subset: Subset) -> list[tuple[Path, Path]]:
    """Return a picture that takes its class tokens with the caption file that was not asked for."""
    if subset.class_tokens is None:
        return []
    usual = [file for ending in _USUAL_CAPTION_ENDINGS for file in _caption_files(path, subset, ending)]
    return [(path, file) for file in usual if file.is_file()][:1]


def _caption_files(path: Path, subset: Subset, ending: str | None = None) -> list[Path]:
    stems = [path.stem]
    if subset.images.face_crop_aug_range and face_in_name(path):
        stems.append(path.stem.rsplit("_", 4)[0])
    return [path.with_name(stem + (ending or subset.caption_extension)) for stem in stems]


def _masks(subset: Subset, pictures: Sequence[Path], findings: Findings) -> Mapping[Path, Path]:
    """Return each picture's mask."""
    folder = subset.mask_dir
    if folder is None:
        return {}
    masks = _partners(subset, pictures, list(pictures_in(folder, recursive=subset.recursive)), folder)
    without = [path for path in pictures if path not in masks]
    if without:
        findings.problems.append(
            f"{_pictures(len(without))} in {subset.image_dir} without a mask of the same name in {folder}: "
            f"{names_of(without)}."
        )
    return masks


def _sources(subset: Subset, pictures: Sequence[Path], findings: Findings) -> Mapping[Path, Path]:
    """Return the picture that each is an edit of."""
    folder = subset.source_dir
    if folder is None:
        return {}
    # Names in a metadata file may lead into subfolders, whatever `recursive` says.
    deep = subset.recursive or subset.metadata_file is not None
    there = list(pictures_in(folder, recursive=deep))
    sources = _partners(subset, pictures, there, folder)
    without = [path for path in pictures if path not in sources]
    if without:
        findings.problems.append(
            f"{_pictures(len(without))} in {subset.image_dir} without a source picture of the same name in "
            f"{folder}: {names_of(without)}. Add those, or put what has none into a subset without "
            f"conditioning_data_dir, which is trained from the captions alone."
        )
    unused = sorted(set(there) - set(sources.values()))
    if unused:
        findings.notes.append(
            f"{_pictures(len(unused))} in {folder} are no picture's source and are not used: "
            f"{names_of(unused)}."
        )
    return sources


def _partners(
    subset: Subset, pictures: Sequence[Path], others: Sequence[Path], folder: Path
) -> dict[Path, Path]:
    """Find each picture's partner in another folder: the same name, or at least the same up to the ending."""
    by_name: dict[Path, Path] = {}
    for other in others:
        place = other.relative_to(folder)
        by_name[place] = other
        by_name.setdefault(place.with_suffix(""), other)
    home = os.path.abspath(subset.image_dir)
    places = {path: Path(os.path.relpath(os.path.abspath(path), home)) for path in pictures}
    found = {path: by_name.get(place) or by_name.get(place.with_suffix("")) for path, place in places.items()}
    return {path: other for path, other in found.items() if other}


def _no_caption(subset: Subset, silent: Sequence[Path]) -> str:
    message = (
        f"{_pictures(len(silent))} in {subset.image_dir} without a caption file "
        f"({subset.caption_extension}): {names_of(silent)}. "
    )
    for ending in _USUAL_CAPTION_ENDINGS:
        others = sum(path.with_suffix(ending).is_file() for path in silent)
        if others and ending != subset.caption_extension:
            return message + f'{others} of them have a {ending} file: set caption_extension = "{ending}".'
    return message + (
        "Write captions, or set class_tokens for all of them, or put an empty caption file beside a picture "
        "that is to be trained without one."
    )


def _nothing_found(subset: Subset) -> str:
    if subset.metadata_file:
        return f"{subset.metadata_file} has no entries."
    message = f"{subset.image_dir} holds no pictures ({' '.join(sorted(PICTURE_ENDINGS))})."
    deeper = not subset.recursive and any(pictures_in(subset.image_dir, recursive=True))
    return message + (" Its subfolders do: set recursive = true." if deeper else "")


def _note_unused_lines(subset: Subset, findings: Findings) -> None:
    if subset.captions.enable_wildcard:
        return
    longer = [found.path for found in findings.found if "\n" in found.text]
    if longer:
        findings.notes.append(
            f"Only the first line is used of the captions of {_pictures(len(longer))} in "
            f"{subset.metadata_file or subset.image_dir}: {names_of(longer)}. enable_wildcard = true draws "
            f"one of the lines."
        )


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"
