"""One of several processes that `accelerate launch --use_fsdp` started: trains once for each line of a file.

A line is a JSON list: whether the model is sharded, and the words of a command line, beginning with a script.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.core.entry import run_script  # noqa: E402


def main() -> None:
    """Train until the lines end."""
    torch.set_num_threads(1)
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        sharded, sys.argv = json.loads(line)
        os.environ["ACCELERATE_USE_FSDP"] = str(sharded).lower()
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    run_script(main)
