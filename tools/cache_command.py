"""What the tools that fill caches have in common: their command line, and whose trainer they ask."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from kandinsky5_train_network import Kandinsky5Trainer
from library.core.errors import ConfigError
from library.options.elsewhere import KANDINSKY5
from library.options.group import parse_options
from library.options.kandinsky5 import Kandinsky5ModelOptions, task_named
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
        ConfigError: as `parse_options` does; flags of a family that is not named; or nothing tells the task
            of a Kandinsky.
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
    if given.family == "lumina":
        _refuse_kandinskys(words)
    family = FAMILIES[given.family]
    options = parse_options(family.options, [f"--{cache}", *words], in_part=True)
    if isinstance(options, Kandinsky5TrainOptions):
        _require_task(options.model)
    return family.trainer(options)


def _refuse_kandinskys(words: Sequence[str]) -> None:
    """Raise ConfigError if one of the flags is of the other family, which is easily forgotten to be named."""
    for word in words:
        flag = word.partition("=")[0]
        if flag.removeprefix("--") in KANDINSKY5:
            raise ConfigError(f"{flag} is a flag of Kandinsky's training script; add --family kandinsky5.")


def _require_task(models: Kandinsky5ModelOptions) -> None:
    """Raise ConfigError if nothing tells whether pictures are drawn from texts, or edited."""
    if task_named(models.task) is None and "pretrained_model_name_or_path" not in vars(models):
        raise ConfigError(
            "Give --task t2i or --task i2i, or name the model with --dit, which tells the task too: an "
            "image-to-image model wants source pictures encoded, a text-to-image model has none."
        )
