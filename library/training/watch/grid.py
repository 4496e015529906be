"""One picture of all sample pictures: a row for each prompt, a column for each moment; it grows with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from library.core.files import atomic_write
from library.core.log import logger

CELL = 256  # pixels, the longer side of a small picture
MAX_SIDE = 16384  # pixels of the whole picture: with many columns the cells get smaller
MARGIN = 4
LINE = 14  # pixels, the height of a line of text

_log = logger("preview")


@dataclass(frozen=True)
class Cell:
    """A small copy of a sample picture; `file` is the picture's name, `caption` what stands over its row."""

    file: str
    caption: str
    small: Image.Image


@dataclass
class Grid:
    """The grid picture at `path`, of pictures in `folder`.

    A row is named by all that decides its pictures; rows are in the order of their names.
    """

    path: Path
    folder: Path
    _cells: dict[tuple[str, str], Cell] = field(default_factory=dict)  # by row and column

    def add(self, row: str, column: str, file: str, caption: str) -> None:
        """Put a picture file in; the one that was there before is replaced. OSError if it cannot be read."""
        with Image.open(self.folder / file) as picture:
            small = ImageOps.contain(picture.convert("RGB"), (CELL, CELL))
        self._cells[row, column] = Cell(file, caption, small)

    def has(self, row: str, column: str) -> bool:
        """Whether there is such a picture."""
        return (row, column) in self._cells

    def write(self) -> None:
        """Write the picture. Raises StorageError."""
        if not self._cells:
            return
        drawn = self._draw()
        with atomic_write(self.path, durable=False) as handle:
            drawn.save(handle, format="PNG")

    def export_state(self) -> dict[str, object]:
        """Return what is where, for JSON; the pictures themselves are files."""
        return {"cells": [[*place, cell.file, cell.caption] for place, cell in self._cells.items()]}

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the pictures of an earlier part of the run, as far as their files are still there."""
        for row, column, file, caption in state["cells"]:
            try:
                self.add(row, column, file, caption)
            except OSError:
                _log.info("%s is not there any more, so the grid of samples goes without", self.folder / file)

    def _draw(self) -> Image.Image:
        rows = {row: cell.caption for (row, _), cell in sorted(self._cells.items(), key=itemgetter(0))}
        columns = list(dict.fromkeys(column for _, column in self._cells))
        cell = min(CELL, MAX_SIDE // len(columns) - MARGIN, MAX_SIDE // len(rows) - MARGIN - LINE)
        width, height = cell + MARGIN, cell + MARGIN + LINE
        picture = Image.new("RGB", (width * len(columns) + MARGIN, height * len(rows) + LINE), "white")
        text = ImageDraw.Draw(picture)
        for x, column in enumerate(columns):
            text.text((MARGIN + x * width, 0), column, fill="black")
        for y, (row, caption) in enumerate(rows.items()):
            text.text((MARGIN, LINE + y * height), " ".join(caption.split())[:300], fill="gray")
            for x, column in enumerate(columns):
                if (row, column) in self._cells:
                    small = self._cells[row, column].small.copy()
                    small.thumbnail((cell, cell))
                    picture.paste(small, (MARGIN + x * width, LINE + y * height + LINE))
        return picture
