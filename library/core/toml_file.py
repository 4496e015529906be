"""TOML and JSON configuration files: the one place that reads and writes them."""

from __future__ import annotations

import json
from pathlib import Path

import toml

from library.core.errors import ConfigError
from library.core.files import read_text


def read_config(path: Path, what: str) -> dict[str, object]:
    """Read a `.toml` or `.json` file into a dict; `what` says in messages what the file is for.

    Raises:
        ConfigError: missing, not UTF-8, not valid TOML or JSON (with the line), or not a table at the top.
    """
    text = read_text(path, what)
    try:
        content = json.loads(text) if Path(path).suffix.lower() == ".json" else toml.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{what} {path}, line {error.lineno}: {error.msg}.") from error
    except (
        toml.TomlDecodeError,
        IndexError,
        TypeError,
        ValueError,
    ) as error:  # toml 0.10 lets parser slips through
        raise ConfigError(f"{what} {path} is not valid TOML: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{what} {path} must hold a table of keys, not a {type(content).__name__}.")
    return content


def dump_toml(content: dict[str, object]) -> str:
    """Return `content` as TOML text; None values are left out, since TOML has no null."""
    return toml.dumps({k: v for k, v in content.items() if v is not None})
