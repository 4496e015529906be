"""Train several times in one process, which imports torch only once: `train_all.py jobs.json`.

The file holds a list of command lines of lumina_train_network.py, as lists of words.
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
    """Train each command line in turn; the first mistake ends it all."""
    for words in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        LuminaTrainer(parse_options(LuminaTrainOptions, words)).train()


if __name__ == "__main__":
    run_script(main)
