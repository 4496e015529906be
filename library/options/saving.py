"""Where results go, and what is logged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.core.errors import ConfigError
from library.options.group import REQUIRED, OptionGroup, option

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True, kw_only=True)
class SavingOptions(OptionGroup):
    """Saving."""

    output_dir: Path = option(REQUIRED, "folder for the trained network, its samples and its logs")
    output_name: str = option("last", "file name of the trained network, without ending")
    save_model_as: str = option("safetensors", "file format", choices=("safetensors",))
    save_precision: str | None = option(
        None, "precision of the saved weights (default: as trained, fp32)", choices=("float", "fp16", "bf16")
    )
    save_every_n_epochs: int | None = option(None, "save the network after every N epochs")
    save_every_n_steps: int | None = option(None, "save the network after every N steps")

    def __post_init__(self) -> None:
        if not self.output_name or Path(self.output_name).name != self.output_name:
            raise ConfigError(
                f"--output_name '{self.output_name}' must be a plain file name; folders go to --output_dir."
            )
        for name in ("save_every_n_epochs", "save_every_n_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} is {value}; it must be 1 or more.")


@dataclass(frozen=True, kw_only=True)
class LoggingOptions(OptionGroup):
    """Logging.

    A metrics file, one JSON object a step, is always written beside the network.
    """

    logging_dir: Path | None = option(None, "folder for TensorBoard logs; turns them on")
    log_with: str | None = option(None, "tracker for the logs in --logging_dir", choices=("tensorboard",))
    log_prefix: str = option("", "put before the time stamp in the name of the log folder")
    log_tracker_name: str = option("network_train", "name of the TensorBoard run folder")
    console_log_level: str = option("INFO", "least severe message to show", choices=LOG_LEVELS)

    def __post_init__(self) -> None:
        if self.log_with is not None and self.logging_dir is None:
            raise ConfigError(f"--log_with {self.log_with} needs --logging_dir.")
