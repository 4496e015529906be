"""The file of what is trained, and that of its running average beside it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path

from library.training.events import Moment
from library.training.output.ema import Ema
from library.training.output.metadata import TrainingFacts, build_metadata

TRAINED, AVERAGE = "trained", "running average (EMA)"
ADVICE = "Make room, or keep fewer files with --save_last_n_files."


class TraineeFile(ABC):
    """Writes what is trained as it is now, with the metadata of the moment."""

    def __init__(self, facts: TrainingFacts, ending: str, ema: Ema | None = None) -> None:
        """`ending`: of the names of its files."""
        self._facts, self._ema = facts, ema
        self._ending = ending

    def write(self, path: Path, moment: Moment) -> list[Path]:
        """Write it, and its average, and return the files.

        Raises StorageError, or NonFiniteError for NaN in the weights, with what was at `path` untouched.
        """
        self._write(path, moment, TRAINED)
        if self._ema is None:
            return [path]
        average_path = path.with_name(f"{path.name.removesuffix(self._ending)}-ema{self._ending}")
        self._write_average(average_path, moment, self._ema)
        return [path, average_path]

    @abstractmethod
    def _write(self, path: Path, moment: Moment, weights: str) -> None:
        """Write the weights that are in the parameters; `weights` says which these are."""

    def _write_average(self, path: Path, moment: Moment, ema: Ema) -> None:
        """Write the average."""
        with ema.in_place():
            self._write(path, moment, AVERAGE)

    def _metadata(self, moment: Moment, weights: str) -> dict[str, str]:
        metadata = build_metadata(self._facts, step=moment.step, epoch=moment.epoch, now=time.time())
        return metadata | {"ss_weights": weights}
