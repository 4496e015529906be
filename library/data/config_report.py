"""All mistakes of a dataset configuration in one message: line, path of the key, what is wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from library.core.errors import ConfigError
from library.core.files import read_text
from library.options.dataset import DatasetOptions

Place = tuple[str | int, ...]  # ("datasets", 0, "subsets", 1, "num_repeats")

_FLAGS = {f.name for f in fields(DatasetOptions)}
_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]")
_KEY = re.compile(r"""\s*(?:([\w-]+)|"([^"]*)"|'([^']*)')\s*=""")


@dataclass
class Report:
    """Collects mistakes. `source` is the file, or None for options of the command line."""

    source: Path | None
    mistakes: list[tuple[Place, str]] = field(default_factory=list)

    def add(self, place: Place, sentence: str) -> None:
        """Note a mistake at a key; the sentence follows the key's path."""
        self.mistakes.append((place, sentence))

    def raise_if_any(self) -> None:
        """Raise one ConfigError that tells all mistakes, in the order of the file."""
        if not self.mistakes:
            return
        lines = self._lines()
        entries = sorted(
            (_line_of(place, lines), f"{self.name(place)}: {_ended(text)}") for place, text in self.mistakes
        )
        told = [f"line {line}, {text}" if line else text for line, text in entries]
        if len(told) == 1:
            raise ConfigError(f"{self.source}, {told[0]}" if self.source else told[0])
        subject = f"{self.source} has" if self.source else "the dataset options have"
        raise ConfigError("\n  ".join([f"{subject} {len(told)} mistakes:", *told]))

    def name(self, place: Place) -> str:
        """Return what a key is called: by its flag if there is no file, for it came from the command line."""
        return f"--{place[-1]}" if self.source is None and place[-1] in _FLAGS else path_of(place)

    def _lines(self) -> dict[Place, int]:
        if self.source is None or self.source.suffix.lower() == ".json":
            return {}
        return lines_of_toml(read_text(self.source, "The dataset configuration"))


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith("?") else sentence + "."


def path_of(place: Place) -> str:
    """Return a place as users write it: `datasets[0].subsets[1].num_repeats`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


def lines_of_toml(text: str) -> dict[Place, int]:
    """Return the line of each table and each key of a TOML text (but not of keys in inline tables)."""
    lines: dict[Place, int] = {}
    last_index: dict[Place, int] = {}
    table: Place = ()
    for number, line in enumerate(text.splitlines(), 1):
        header, key = _HEADER.match(line), _KEY.match(line)
        if header:
            table = _enter(header, last_index)
            lines.setdefault(table, number)
        elif key:
            lines.setdefault((*table, key[1] or key[2] or key[3] or ""), number)
    return lines


def _enter(header: re.Match[str], last_index: dict[Place, int]) -> Place:
    """Return the place of the table that a header opens, counting the tables of each array."""
    place: Place = ()
    names = [name.strip().strip("\"'") for name in header[2].split(".")]
    for i, name in enumerate(names):
        place = (*place, name)
        if header[1] == "[[" and i == len(names) - 1:
            last_index[place] = last_index.get(place, -1) + 1
        if place in last_index:
            place = (*place, last_index[place])
    return place


def _line_of(place: Place, lines: dict[Place, int]) -> int:
    """The line of a key, else of the nearest table around it; 0 when unknown."""
    while place and place not in lines:
        place = place[:-1]
    return lines.get(place, 0)
