"""Fine-tune all weights of Kandinsky 5.0 Image.

The same trainer as kandinsky5_train_network.py; what differs is what it trains.
"""

from __future__ import annotations

from kandinsky5_train_network import Kandinsky5Trainer
from library.core.entry import run_script
from library.options.group import parse_options
from library.options.train_kandinsky5 import Kandinsky5FinetuneOptions
from library.training.trainee.weights import WeightsKind


class Kandinsky5Finetuner(Kandinsky5Trainer):
    """Trains the model's own weights."""

    trainee_kind = WeightsKind()


def main() -> None:
    """Read the options, then train."""
    Kandinsky5Finetuner(
        parse_options(Kandinsky5FinetuneOptions, description=__doc__.partition("\n")[0])
    ).train()


if __name__ == "__main__":
    run_script(main)
