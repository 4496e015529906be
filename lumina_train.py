"""Fine-tune all weights of Lumina Image 2.0.

The same trainer as lumina_train_network.py; what differs is what it trains.
"""

from __future__ import annotations

from library.core.entry import run_script
from library.options.group import parse_options
from library.options.train import LuminaFinetuneOptions
from library.training.trainee.weights import WeightsKind
from lumina_train_network import LuminaTrainer


class LuminaFinetuner(LuminaTrainer):
    """Trains the model's own weights."""

    trainee_kind = WeightsKind()


def main() -> None:
    """Read the options, then train."""
    LuminaFinetuner(parse_options(LuminaFinetuneOptions, description=__doc__.partition("\n")[0])).train()


if __name__ == "__main__":
    run_script(main)
