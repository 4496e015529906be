"""Places that a run's numbers and pictures go to: a metrics file always, TensorBoard and W&B when asked for.

Torch-free until a tracker is made, so that what it needs can be checked before torch is imported.
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
import tomllib
from collections.abc import Mapping
from os import SEEK_END
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from library.core.errors import ConfigError, MissingPackageError
from library.core.suggest import did_you_mean
from library.core.toml_file import read_config
from library.options.saving import LoggingOptions

if TYPE_CHECKING:
    import numpy as np


_BLOCK = 4096  # bytes read at a time from the end of a metrics file


class Tracker(Protocol):
    """A place that numbers and pictures go to. `step` counts the optimizer steps done; it never goes back."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` at `step`."""

    def picture(self, step: int, name: str, pixels_HWC: np.ndarray, caption: str) -> None:
        """Record a picture (uint8, RGB) at `step`."""

    def config(self, text: str) -> None:
        """Show the run's configuration, given as TOML."""

    def close(self) -> None:
        """Finish writing."""


class JsonLines:
    """One JSON object a line, appended; `session` tells runs that share a file apart."""

    def __init__(self, path: Path, session: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = open(path, "a+b", buffering=0)
        self._session = session
        self._unwritten = b""
        _drop_torn_line(self._file)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line. JSON has no NaN and no infinity, so those become null.

        Raises OSError if the disk takes no more; the next call then writes what is left, too.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"session": self._session, "step": step} | finite) + "\n"
        self._unwritten += line.encode()
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def picture(self, step: int, name: str, pixels_HWC: np.ndarray, caption: str) -> None:
        """Leave pictures to the sample folder."""

    def config(self, text: str) -> None:
        """Leave the configuration to its own file, which is beside this one."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _drop_torn_line(file: BinaryIO) -> None:
    """Cut off a last line that a kill left without its end."""
    size = end = file.seek(0, SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)


class TensorBoard:
    """TensorBoard under `<logging_dir>/<log_prefix><time stamp>/<log_tracker_name>`."""

    def __init__(self, options: LoggingOptions, settings: Mapping[str, object]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second of import that most runs need not pay

        assert options.logging_dir is not None
        stamp = options.log_prefix + time.strftime("%Y%m%d%H%M%S")
        folder = options.logging_dir / stamp / options.log_tracker_name
        self._writer = SummaryWriter(str(folder), **settings)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add each value as a scalar."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels_HWC: np.ndarray, caption: str) -> None:
        """Add a picture."""
        self._writer.add_image(name, pixels_HWC, step, dataformats="HWC")

    def config(self, text: str) -> None:
        """Add it as text; TensorBoard reads Markdown."""
        self._writer.add_text("config", f"```toml\n{text}```")

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """A run at wandb.ai, or in its folder when `WANDB_MODE=offline`."""

    def __init__(self, options: LoggingOptions, settings: Mapping[str, object]) -> None:
        import wandb  # an optional package; `check_trackers` has looked for it

        self._wandb = wandb
        given = {"project": options.log_tracker_name, "name": options.wandb_run_name}
        if options.logging_dir is not None:
            options.logging_dir.mkdir(parents=True, exist_ok=True)
            given["dir"] = str(options.logging_dir)
        try:
            if options.wandb_api_key is not None:
                wandb.login(key=options.wandb_api_key)
            self._run = wandb.init(**{**given, **settings})
        except wandb.errors.Error as error:
            raise ConfigError(
                f"W&B could not be started: {error}. Log in with `wandb login` or --wandb_api_key, or set "
                f"WANDB_MODE=offline to log into a folder."
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, pixels_HWC: np.ndarray, caption: str) -> None:
        """Log a picture with its prompt."""
        self._run.log({name: self._wandb.Image(pixels_HWC, caption=caption)}, step=step)

    def config(self, text: str) -> None:
        """Fill the run's table of settings, section by section."""
        self._run.config.update(tomllib.loads(text))

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


_TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def check_trackers(options: LoggingOptions) -> None:
    """Check packages and settings of the trackers before torch is imported.

    Raises:
        MissingPackageError: a tracker's package is not installed.
        ConfigError: --log_tracker_config is missing, broken, or for no tracker of this run.
    """
    for name in options.trackers:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise MissingPackageError(_PACKAGES[name], f"--log_with {options.log_with or name}")
    _tracker_settings(options)


def make_trackers(
    options: LoggingOptions, metrics_file: Path, session: str, *, is_main: bool
) -> list[Tracker]:
    """Return the trackers that the options ask for; none on other processes."""
    if not is_main:
        return []
    settings = _tracker_settings(options)
    trackers = [_TRACKERS[name](options, settings.get(name, {})) for name in options.trackers]
    return [JsonLines(metrics_file, session), *trackers]


def _tracker_settings(options: LoggingOptions) -> dict[str, dict[str, object]]:
    """Read --log_tracker_config: a table for each tracker, of what its writer or run is made with."""
    if options.log_tracker_config is None:
        return {}
    tables = read_config(options.log_tracker_config, "--log_tracker_config")
    for name, table in tables.items():
        if name not in options.trackers or not isinstance(table, dict):
            known = ", ".join(f"[{tracker}]" for tracker in options.trackers)
            raise ConfigError(
                f"{options.log_tracker_config}: '{name}' is not a table for a tracker of this run; there may "
                f"be {known}{did_you_mean(name, options.trackers) or '.'}"
            )
    return tables  # type: ignore[return-value]  # checked just now
