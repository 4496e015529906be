"""When what is trained is written, and under which name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from library.core.errors import StorageError
from library.core.log import logger
from library.options.saving import SavingOptions
from library.training.events import Interval, Moment
from library.training.output.retention import Retention

log = logger("saving")

Write = Callable[[Path, Moment], list[Path]]


class PeriodicSave:
    """Saves the network every N epochs or steps; the file at the very end is `final_path`'s.

    Names are those of the reference tool: `<name>-000003.safetensors` after epoch 3 and
    `<name>-step00000100.safetensors` after step 100.
    """

    shared = False

    def __init__(self, options: SavingOptions, write: Write, *, total_epochs: int) -> None:
        self._options = options
        self._write = write
        self._by_epoch = Interval(epochs=options.epoch_interval(total_epochs))
        self._by_step = Interval(steps=options.save_every_n_steps)
        self.retention = Retention(options)

    def due(self, moment: Moment) -> bool:
        """Whether a periodic file is due; at the end of the run the final file takes its place."""
        return not moment.run_ended and (self._by_epoch.hits(moment) or self._by_step.hits(moment))

    def run(self, moment: Moment) -> None:
        """Write the files that are due, then remove those that are not kept any longer.

        Without room for a file nothing is removed and training goes on, as a later save may find room.
        """
        if self._by_epoch.hits(moment):
            self._save(f"-{moment.epoch:06d}", moment, by_epoch=True)
        if self._by_step.hits(moment):
            self._save(f"-step{moment.step:08d}", moment, by_epoch=False)

    def _save(self, suffix: str, moment: Moment, *, by_epoch: bool) -> None:
        path = _path(self._options, suffix)
        try:
            files = self._write(path, moment)
        except StorageError as error:
            log.warning("%s Training goes on, and the next file is tried when it is due.", error)
            return
        log.info("saved %s", path)
        self.retention.add(files, by_epoch=by_epoch, step=moment.step)


def final_path(options: SavingOptions) -> Path:
    """Return the path of the network as it is at the end of training."""
    return _path(options, "")


def config_path(options: SavingOptions) -> Path:
    """Return the path of the file from which the run can be repeated."""
    return options.output_dir / f"{options.output_name}.config.toml"


def grid_path(options: SavingOptions) -> Path:
    """Return the path of the picture of all sample pictures."""
    return options.output_dir / f"{options.output_name}.samples.png"


def metrics_path(options: SavingOptions) -> Path:
    """Return the path of the metrics file."""
    return options.output_dir / f"{options.output_name}.metrics.jsonl"


def _path(options: SavingOptions, suffix: str) -> Path:
    return options.output_dir / f"{options.output_name}{suffix}{options.ending}"
