"""Stopping and going on: states of a run, where to start from, when to stop, what to do about NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from library.core.errors import ConfigError
from library.options.group import OptionGroup, option

LATEST = "latest"


@dataclass(frozen=True, kw_only=True)
class StateOptions(OptionGroup):
    """Stopping and resuming.

    A state is a folder with all that is needed to go on exactly; see docs/resume.md.
    """

    save_state: bool = option(
        False, "save a state whenever --save_every_n_* saves a file, and at the end of training"
    )
    save_state_on_train_end: bool = option(False, "save a state at the end of training")
    save_state_every_n_minutes: float = option(
        10.0,
        "have a state that is no older than this; the newest two are kept, until training is done; 0: none",
    )
    save_last_n_epochs_state: int | None = option(
        None,
        "keep the states of the last N saves by epoch (default: --save_last_n_epochs, else all); the newest "
        "two states always stay",
    )
    save_last_n_steps_state: int | None = option(
        None,
        "keep states saved by step until N steps later (default: --save_last_n_steps, else all); the newest "
        "two states always stay",
    )
    resume: str | None = option(
        None,
        "go on from this state folder, or from the 'latest' one of --output_name; "
        "where there is none yet, 'latest' starts from the beginning; it keeps a state at the end too",
        metavar="FOLDER",
        saved=False,
    )
    initial_epoch: int | None = option(None, "start with this epoch, from 1; its data come as in a full run")
    initial_step: int | None = option(None, "start after this many steps; wins over --initial_epoch")
    skip_until_initial_step: bool = option(
        False, "skip the data before the start; always so here, and it costs no time"
    )
    max_train_minutes: float | None = option(
        None, "after this many minutes save a state and leave with exit code 75"
    )
    on_nan: str = option(
        "stop", "what to do about a step whose loss or gradient is NaN or infinite", choices=("stop", "skip")
    )

    def __post_init__(self) -> None:
        least = {
            "save_last_n_epochs_state": 1,
            "save_last_n_steps_state": 1,
            "initial_epoch": 1,
            "initial_step": 0,
        }
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"--{name} is {value}; it must be {lowest} or more.")
        if self.max_train_minutes is not None and not self.max_train_minutes > 0:
            raise ConfigError(f"--max_train_minutes is {self.max_train_minutes:g}; it must be more than 0.")
        if not 0 <= self.save_state_every_n_minutes < math.inf:
            raise ConfigError(
                f"--save_state_every_n_minutes is {self.save_state_every_n_minutes:g}; it must be 0 or more."
            )

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag about a start or about states that there are not."""
        yield from super().adjustments()
        if (self.resume, self.initial_epoch, self.initial_step) == (None, None, None):
            yield from self.without_effect(("skip_until_initial_step",), "training starts at the beginning")
        if not self.save_state:
            names = ("save_last_n_epochs_state", "save_last_n_steps_state")
            yield from self.without_effect(names, "it is about the states of --save_state")

    @property
    def any(self) -> bool:
        """Whether a state is saved at any time, unless the run is asked to stop."""
        return self.at_end or self.save_state_every_n_minutes > 0

    @property
    def at_end(self) -> bool:
        """Whether a state is saved at the end of training.

        With `--resume latest` it is, so that the same command, given once more, finds the run done.
        """
        return self.save_state or self.save_state_on_train_end or self.resume == LATEST


@dataclass(frozen=True, kw_only=True)
class ModelStateOptions(StateOptions):
    """Resume.

    A state has everything that a run needs to go on exactly. That of a whole model is several times as large
    as the model.
    """

    save_state_every_n_minutes: float = option(
        60.0,
        "have a state that is no older than this; the newest two are kept, until training is done; 0: none",
    )
