"""Messages of a run: plain lines on stderr, from the main process only."""

from __future__ import annotations

import logging
import sys

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def setup_logging(level: str, *, is_main: bool = True) -> None:
    """Send the project's messages to stderr; processes other than the main one stay silent below ERROR."""
    root = logging.getLogger("flow_scripts")
    root.handlers = [logging.StreamHandler(sys.stderr)]
    root.handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    root.setLevel(level if is_main else "ERROR")
    root.propagate = False


def logger(name: str) -> logging.Logger:
    """Return the logger of a part of the project."""
    return logging.getLogger(f"flow_scripts.{name}")
