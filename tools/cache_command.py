"""What the tools that fill caches have in common: their command line, and whose trainer they ask."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from kandinsky5_train_network import Kandinsky5Trainer
from library.options.group import parse_options
from library.options.train import LuminaTrainOptions, TrainOptions
from library.options.train_kandinsky5 import Kandinsky5TrainOptions
from library.training.trainer import NetworkTrainer
from lumina_train_network import LuminaTrainer


@dataclass(frozen=True)
class Family:
    """A training script: its trainer, and the options that it takes."""

    trainer: type[NetworkTrainer]
    options: type[TrainOptions]


FAMILIES = {
    "lumina": Family(LuminaTrainer, LuminaTrainOptions),
    "kandinsky5": Family(Kandinsky5Trainer, Kandinsky5TrainOptions),
}


def read_command(about: str, cache: str) -> NetworkTrainer:
    """Read the command line: --family, and the flags of that family's training script.

    Args:
        about: what --help says. cache: the flag that asks for the cache, whether it is given or not.

    Returns:
        The trainer. Options that are obligatory in training are missed only when they are read.

    Raises:
        ConfigError: as `parse_options` does.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--family NAME] [flags of the training script]",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--family", choices=tuple(FAMILIES), default="lumina", help="whose flags they are (default: lumina)"
    )
    given, words = parser.parse_known_args()
    family = FAMILIES[given.family]
    return family.trainer(parse_options(family.options, [f"--{cache}", *words], in_part=True))
