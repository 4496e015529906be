"""Metadata files of fine-tuning datasets: which pictures, with which captions.

`.json` is a table from picture to entry; `.jsonl` has one entry a line, with the picture as `image_path`. An
entry has a `caption`, `tags`, or both. Whatever else taggers write there (sizes, scores) is not needed: sizes
are read from the pictures.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.core.errors import DataError
from library.core.files import read_text
from library.data.folders import is_picture
from library.data.items import CaptionOptions, Subset


@dataclass(frozen=True)
class Entry:
    """A picture of a metadata file. `text` is None when it has neither caption nor tags."""

    path: Path
    text: str | None


def read_entries(subset: Subset) -> tuple[list[Entry], list[str]]:
    """Return the entries of a subset's metadata file, and sentences about entries that cannot be used.

    Raises:
        ConfigError: the file is not UTF-8. DataError: it is not JSON of the expected form.
    """
    file = subset.metadata_file
    text = read_text(file, "The metadata file")
    rows = _rows_of_lines(file, text) if file.suffix.lower() == ".jsonl" else _rows_of_table(file, text)
    entries, problems, folders = [], [], _Folders()
    for where, name, row in rows:
        try:
            path = folders.find(_contained(subset.image_dir, name))
            entries.append(Entry(path, _text_of(row, subset.captions)))
        except ValueError as error:
            problems.append(f"{file}, {where}: {error}.")
    return entries, problems


def _rows_of_table(file: Path, text: str) -> list[tuple[str, Any, Any]]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"The metadata file {file}, line {error.lineno}: {error.msg}.") from error
    if not isinstance(content, dict):
        raise DataError(f"The metadata file {file} must hold a table from pictures to entries.")
    return [(f"'{name}'", name, row) for name, row in content.items()]


def _rows_of_lines(file: Path, text: str) -> list[tuple[str, Any, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"The metadata file {file}, line {number}: {error.msg}.") from error
        if not isinstance(row, dict) or not isinstance(row.get("image_path"), str):
            raise DataError(f"The metadata file {file}, line {number}: there is no 'image_path'.")
        rows.append((f"line {number}", row["image_path"], row))
    return rows


def _text_of(row: Any, options: CaptionOptions) -> str | None:
    """The caption with the tags behind it, on each of its lines if one of them is to be drawn."""
    if not isinstance(row, dict):
        raise ValueError(f"an entry must be a table, not {row!r}")
    caption, tags = row.get("caption"), row.get("tags")
    for name, value in (("caption", caption), ("tags", tags)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} must be a text, not {value!r}")
    if caption is None and tags is None:
        return None
    if not tags:
        return (caption or "").strip()
    tags = options.caption_separator.join(line.strip() for line in tags.split("\n") if line.strip())
    lines = [line.strip() for line in (caption or "").split("\n") if line.strip()]
    if not options.enable_wildcard:
        lines = lines[:1]
    return "\n".join(line + options.caption_separator + tags for line in lines) or tags


def _contained(folder: Path | None, name: str) -> Path:
    """Return the path that a name means. Raises ValueError if it leads out of the subset's folder."""
    if "\0" in name or not name.strip():
        raise ValueError(f"{name!r} is not a file name")
    if folder is None:
        if os.path.isabs(name):
            return Path(name)
        raise ValueError(f"'{name}' is not an absolute path, so the subset needs an image_dir")
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(os.path.normpath(folder)) and not path.is_relative_to(os.path.abspath(folder)):
        raise ValueError(f"'{name}' lies outside of image_dir {folder}")
    return path


class _Folders:
    """Looks pictures up by name, also without their ending, reading each folder once."""

    def __init__(self) -> None:
        self._names: dict[Path, set[str]] = {}

    def find(self, path: Path) -> Path:
        """Return the picture meant by `path`. Raises ValueError if there is none."""
        if path.parent not in self._names:
            self._names[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        names = self._names[path.parent]
        if path.name in names:
            return path
        same = sorted(n for n in names if Path(n).stem == path.name and is_picture(Path(n)))
        if not same:
            raise ValueError(f"the picture {path} does not exist")
        return path.with_name(same[0])
