"""Trains once for each line of a file, or of its input, in one process, so that torch is imported only once.

A line holds the words of a command line of lumina_train_network.py as a JSON list. Each is answered with
"done"; a mistake ends the process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.core.entry import run_script  # noqa: E402
from library.options.group import parse_options  # noqa: E402
from library.options.train import LuminaTrainOptions  # noqa: E402
from lumina_train_network import LuminaTrainer  # noqa: E402


def main() -> None:
    """Train until the lines end."""
    with open(sys.argv[1], encoding="utf-8") if len(sys.argv) > 1 else sys.stdin as lines:
        for line in lines:
            LuminaTrainer(parse_options(LuminaTrainOptions, json.loads(line))).train()
            print("done", flush=True)


if __name__ == "__main__":
    run_script(main)
