"""TOML and JSON configuration files: the one place that reads and writes them.

Read with the standard library, because the `toml` package takes broken files for valid ones (`count = [` is
a table to it); written with `toml`, because the standard library cannot write. It is imported where it
writes, so that whatever only reads does without it.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from library.core.errors import ConfigError, MissingPackageError
from library.core.files import read_text


def read_config(path: Path, what: str) -> dict[str, object]:
    """Read a `.toml` or `.json` file into a dict; `what` says in messages what the file is for.

    Raises:
        ConfigError: missing, not UTF-8, not valid TOML or JSON (with the line), or not a table at the top.
    """
    return table_of(read_content(path, what), path, what)


def table_of(content: object, path: Path, what: str) -> dict[str, object]:
    """Return what was read from a file if it is a table. Raises ConfigError otherwise."""
    if not isinstance(content, dict):
        raise ConfigError(f"{what} {path} must hold a table of keys, not a {type(content).__name__}.")
    return content


def read_content(path: Path, what: str) -> object:
    """Read a `.toml` or `.json` file; JSON may hold a list at the top. Raises as `read_config`."""
    text = read_text(path, what)
    try:
        return json.loads(text) if Path(path).suffix.lower() == ".json" else tomllib.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{what} {path}, line {error.lineno}: {error.msg}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{what} {path} is not valid TOML: {error}.") from error


def dump_toml(content: dict[str, object]) -> str:
    """Return `content` as TOML text; None values are left out, since TOML has no null.

    Raises:
        MissingPackageError: the package that writes TOML is not installed.
    """
    try:
        import toml
    except ModuleNotFoundError as error:
        raise MissingPackageError("toml", "Writing a TOML file") from error
    encoder = toml.TomlEncoder()
    encoder.dump_funcs[str] = _quoted  # the package's own turns a backslash before x into nothing
    return toml.dumps({k: v for k, v in content.items() if v is not None}, encoder)


def _quoted(text: str) -> str:
    """A JSON string is a TOML string, but for the one control character that JSON leaves as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
