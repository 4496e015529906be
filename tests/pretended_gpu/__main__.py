"""Runs a script, or with -m a module, on the pretended GPU."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from tests.pretended_gpu.install import install


def main() -> None:
    """Take the words of the command line as Python would."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tests.pretended_gpu SCRIPT [ARGUMENTS], or -m MODULE [ARGUMENTS]")
    install()
    if sys.argv[1] == "-m":
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = sys.argv[1:]
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


main()
