"""Configuration files: options read from one, and the options of a run written as one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from library.core.errors import ConfigError
from library.core.toml_file import dump_toml, read_config


def words_of(path: Path, parser: argparse.ArgumentParser, way_out: Callable[[str], str]) -> list[str]:
    """Turn a config file into command-line words, so that both are checked by the same rules.

    way_out: what a message says behind an unknown key.

    Raises:
        ConfigError: it cannot be read, has unknown keys, the same key twice, or a switch that is neither
            true nor false.
    """
    path = with_ending(path)
    actions = {_bare(name): action for name, action in parser._option_string_actions.items()}
    # SimpleTuner writes the dashes of a flag into its keys.
    entries = [(_bare(key), value) for key, value in _flattened(read_config(path, "The config file"))]
    unknown = [key for key in dict(entries) if key not in actions]
    if unknown:
        raise ConfigError(_unknown_keys(path, unknown, way_out))
    words: list[str] = []
    seen: set[str] = set()
    for key, value in entries:
        if key in seen:
            raise ConfigError(f"{path}: '{key}' is there twice, in two sections or with dashes; keep one.")
        seen.add(key)
        words += _words(path, key, value, actions[key])
    return words


def config_text(options: object) -> str:
    """Return a script's options as a TOML file that gives the same options when it is read again.

    Paths become absolute, so that the file can be used from every folder. What is not `saved` (see `option`)
    and what cannot be used or has no effect here is left out.
    """
    sections = {name: _section(getattr(options, name)) for name in (f.name for f in fields(options))}
    return dump_toml({name: section for name, section in sections.items() if section})


def with_ending(path: Path) -> Path:
    """Add .toml to a name without ending, as sd-scripts does."""
    return path if path.suffix else path.with_suffix(".toml")


def _bare(name: str) -> str:
    return name.removeprefix("--")


def _unknown_keys(path: Path, keys: Sequence[str], way_out: Callable[[str], str]) -> str:
    """Return a message about all of them: a file of another program has many."""
    if len(keys) == 1:
        return f"{path}: unknown key '{keys[0]}'{way_out(keys[0])}"
    return "\n  ".join([f"{path} has {len(keys)} unknown keys:", *(f"'{key}'{way_out(key)}" for key in keys)])


def _flattened(table: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flattened(value)
        else:
            yield key, value


def _words(path: Path, key: str, value: object, action: argparse.Action) -> list[str]:
    if action.nargs in (0, "?") and isinstance(value, int) and value in (0, 1):
        value = bool(value)  # kohya_ss writes some ticks of its form as numbers
    if isinstance(value, bool) and action.nargs == "?":  # a switch that is on unless it is told to be off
        return [f"--{key}={str(value).lower()}"]
    if isinstance(value, bool):
        return [f"--{key}"] if value else []
    if action.nargs == 0:  # a switch
        raise ConfigError(f"{path}: {key} = {value!r} must be true or false, without quotes.")
    if isinstance(value, list):
        takes_several = action.nargs is not None
        return [f"--{key}", *map(str, value)] if takes_several else [f"--{key}={','.join(map(str, value))}"]
    return [f"--{key}={value}"]


def _section(group: Any) -> dict[str, object]:
    kept = [f for f in fields(group) if f.metadata["saved"]]
    written = {f.name: _written(f, getattr(group, f.name)) for f in kept}
    return {name: value for name, value in written.items() if value is not None}


def _written(field: Field, value: Any) -> object:
    """The inverse of what the parser does to the words of a flag."""
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, tuple):
        items = [str(item.absolute()) if isinstance(item, Path) else item for item in value]
        return items if field.metadata["nargs"] else ",".join(map(str, items))
    return value
