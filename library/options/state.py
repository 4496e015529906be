"""Stopping and going on: states of a run, where to start from, when to stop, what to do about NaN."""

from __future__ import annotations

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
        False, "save a state whenever --save_every_n_* saves the network, and at the end of training"
    )
    save_state_on_train_end: bool = option(False, "save a state at the end of training")
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
        "where there is none yet, 'latest' starts from the beginning",
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
        starts_later = (self.resume, self.initial_epoch, self.initial_step) != (None, None, None)
        if self.skip_until_initial_step and not starts_later:
            raise ConfigError(
                "--skip_until_initial_step has nothing to skip to; give --resume, --initial_epoch or "
                "--initial_step too, or leave it out."
            )

    @property
    def at_end(self) -> bool:
        """Whether a state is saved at the end of training."""
        return self.save_state or self.save_state_on_train_end
