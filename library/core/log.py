"""Messages of a run: plain lines on stderr, from the main process only."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from library.core.errors import ConfigError
from library.core.files import explain

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def setup_logging(
    level: str, *, is_main: bool = True, file: Path | None = None, simple: bool = False
) -> None:
    """Send the project's messages to stderr; processes other than the main one stay silent below ERROR.

    `file`: append them to this file instead. `simple`: the messages alone, without time and level.

    Raises:
        ConfigError: the file cannot be written.
    """
    root = logging.getLogger("flow_scripts")
    for handler in root.handlers:
        handler.close()
    root.handlers = [_file_handler(file) if file else logging.StreamHandler(sys.stderr)]
    layout = "%(message)s" if simple else "%(asctime)s %(levelname)-7s %(message)s"
    root.handlers[0].setFormatter(logging.Formatter(layout, "%H:%M:%S"))
    root.setLevel(level if is_main else "ERROR")
    root.propagate = False


def _file_handler(path: Path) -> logging.Handler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--console_log_file {path} cannot be written: {explain(error)}.") from error


def logger(name: str) -> logging.Logger:
    """Return the logger of a part of the project."""
    return logging.getLogger(f"flow_scripts.{name}")
