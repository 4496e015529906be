"""Where results go, and what is logged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from library.core.errors import ConfigError
from library.core.log import LEVELS, setup_logging
from library.options.group import REQUIRED, OptionGroup, option

_FOLDERS = ("diffusers", "diffusers_safetensors")
KOHYA, DIFFUSERS = "kohya", "diffusers"  # whose names a network's file has
ORIGINAL = "original"  # or DIFFUSERS: the layout of a model's file


@dataclass(frozen=True, kw_only=True)
class SavingOptions(OptionGroup):
    """Saving."""

    output_dir: Path = option(REQUIRED, "folder for what is trained, its samples and its logs")
    output_name: str = option("last", "file name of what is trained, without ending")
    save_model_as: str = option(
        "safetensors",
        "file format; ckpt and pt are pickles without metadata, which other tools read but this one does not",
        choices=("safetensors", "ckpt", "pt"),
    )
    save_precision: str | None = option(
        None, "precision of the saved weights (default: as trained, fp32)", choices=("float", "fp16", "bf16")
    )
    save_format: str = option(
        KOHYA,
        "whose names the file has: kohya, which sd-scripts and ComfyUI read, or diffusers, whose pipelines "
        "load it",
        choices=(KOHYA, DIFFUSERS),
    )
    save_every_n_epochs: int | None = option(None, "save what is trained after every N epochs")
    save_every_n_steps: int | None = option(None, "save what is trained after every N steps")
    save_n_epoch_ratio: int | None = option(
        None, "save at least N times, evenly over the epochs; wins over --save_every_n_epochs"
    )
    save_last_n_epochs: int | None = option(None, "keep the last N of the files saved by epoch")
    save_last_n_steps: int | None = option(None, "keep files saved by step until N steps later")
    save_last_n_files: int | None = option(None, "keep the last N files, saved by epoch or by step")

    def __post_init__(self) -> None:
        self._check()
        if self.save_format == DIFFUSERS and self.save_model_as != "safetensors":
            raise ConfigError(
                f"--save_format {DIFFUSERS} needs --save_model_as safetensors: diffusers reads settings from "
                f"the file's metadata, for which {self.save_model_as} has no place."
            )

    @property
    def ending(self) -> str:
        """What comes behind the name of a saved file."""
        return f".{self.save_model_as}"

    def _check(self) -> None:
        """Raise ConfigError for names and numbers that cannot be."""
        if not self.output_name or Path(self.output_name).name != self.output_name:
            raise ConfigError(
                f"--output_name '{self.output_name}' must be a plain file name; folders go to --output_dir."
            )
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"--{f.name} is {value}; it must be 1 or more.")
        if self.save_last_n_files is not None and not (self.saves_by_epoch or self.save_every_n_steps):
            raise ConfigError(
                "--save_last_n_files says which files to keep, but none are saved: add --save_every_n_epochs "
                "or --save_every_n_steps."
            )

    @property
    def saves_by_epoch(self) -> bool:
        """Whether there are saves after epochs."""
        return bool(self.save_every_n_epochs or self.save_n_epoch_ratio)

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag about files that are not saved."""
        yield from super().adjustments()
        if not self.saves_by_epoch:
            reason = "nothing is saved by epoch (--save_every_n_epochs)"
            yield from self.without_effect(("save_last_n_epochs",), reason)
        if not self.save_every_n_steps:
            reason = "nothing is saved by step (--save_every_n_steps)"
            yield from self.without_effect(("save_last_n_steps",), reason)
        if self.save_n_epoch_ratio:
            yield from self.without_effect(("save_every_n_epochs",), "--save_n_epoch_ratio decides")

    def epoch_interval(self, total_epochs: int) -> int | None:
        """Return after how many epochs there is a save, in a run of `total_epochs`; None for never."""
        if self.save_n_epoch_ratio is None:
            return self.save_every_n_epochs
        return max(1, total_epochs // self.save_n_epoch_ratio)


@dataclass(frozen=True, kw_only=True)
class ModelSavingOptions(SavingOptions):
    """Saving.

    A trained model is one file, in the layout of its original release, or a folder for diffusers.
    """

    save_model_as: str = option(
        "safetensors",
        "a safetensors file; diffusers or diffusers_safetensors: the same as --save_format diffusers",
        choices=("safetensors", *_FOLDERS, "ckpt", "pt"),
    )
    save_precision: str | None = option(
        None,
        "precision of the saved weights (default: that of the weights that the model computes with)",
        choices=("float", "fp16", "bf16"),
    )
    save_format: str = option(
        ORIGINAL,
        "original: one file in the layout of the model's authors, which sd-scripts and ComfyUI read; or "
        "diffusers: a folder that its pipelines load",
        choices=(ORIGINAL, DIFFUSERS),
    )

    def __post_init__(self) -> None:
        if self.save_model_as in ("ckpt", "pt"):
            raise ConfigError(
                f"--save_model_as {self.save_model_as}: a whole model is not saved as a pickle, which would "
                "have to be in memory a second time. Leave it out."
            )
        self._check()

    @property
    def ending(self) -> str:
        """What comes behind the name of a saved model."""
        return "" if self.in_folder else ".safetensors"

    @property
    def in_folder(self) -> bool:
        """Whether a model is saved as diffusers has it."""
        return self.save_format == DIFFUSERS or self.save_model_as in _FOLDERS


@dataclass(frozen=True, kw_only=True)
class LoggingOptions(OptionGroup):
    """Logging.

    A metrics file, one JSON object a step, is always written beside what is saved.
    """

    logging_dir: Path | None = option(
        None, "folder for TensorBoard's and W&B's logs; alone it turns TensorBoard on"
    )
    log_with: str | None = option(
        None, "where numbers and sample pictures are shown", choices=("tensorboard", "wandb", "all")
    )
    log_prefix: str = option("", "put before the time stamp in the name of the log folder")
    log_tracker_name: str = option(
        "network_train", "name of the TensorBoard run folder and of the W&B project"
    )
    wandb_run_name: str | None = option(None, "name of the W&B run (default: W&B invents one)")
    wandb_api_key: str | None = option(
        None, "key to log in to W&B with; better: run `wandb login` once", saved=False
    )
    log_tracker_config: Path | None = option(
        None, "TOML file with tables [tensorboard] and [wandb]: arguments for SummaryWriter and wandb.init"
    )
    log_config: bool = option(False, "show the run's configuration in the trackers too")
    console_log_level: str = option("INFO", "least severe message to show", choices=LEVELS)
    console_log_file: Path | None = option(None, "append messages to this file instead of showing them")
    console_log_simple: bool = option(False, "show messages without time and level")

    def __post_init__(self) -> None:
        if "tensorboard" in self.trackers and self.logging_dir is None:
            raise ConfigError(f"--log_with {self.log_with} needs --logging_dir.")

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag of a tracker that is not in use."""
        yield from super().adjustments()
        if not self.trackers:
            names = ("log_prefix", "log_tracker_name", "log_tracker_config", "log_config")
            yield from self.without_effect(names, "there is no tracker (--logging_dir, --log_with)")
        if "wandb" not in self.trackers:
            names = ("wandb_run_name", "wandb_api_key")
            yield from self.without_effect(names, "nothing is logged to W&B (--log_with wandb)")

    def set_up(self, *, is_main: bool = True) -> None:
        """Send messages where they are to go; of processes other than the main one only errors.

        Raises:
            ConfigError: the file for them cannot be written.
        """
        setup_logging(
            self.console_log_level,
            is_main=is_main,
            file=self.console_log_file,
            simple=self.console_log_simple,
        )

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers in use beside the metrics file."""
        if self.log_with is None:
            return () if self.logging_dir is None else ("tensorboard",)
        return ("tensorboard", "wandb") if self.log_with == "all" else (self.log_with,)


@dataclass(frozen=True, kw_only=True)
class ModelLoggingOptions(LoggingOptions):
    """Logging.

    A metrics file, one JSON object a step, is always written beside what is saved.
    """

    log_tracker_name: str = option("finetuning", "name of the TensorBoard run folder and of the W&B project")
