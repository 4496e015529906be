"""When the trained network is written, and under which name."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from library.core.device import dtype_named
from library.core.log import logger
from library.options.saving import SavingOptions
from library.training.events import Interval, Moment
from library.training.metadata import TrainingFacts, build_metadata
from networks.files import save_network
from networks.lora import LoRANetwork

log = logger("saving")

Write = Callable[[Path, Moment], None]


class NetworkFile:
    """Writes the trained network with the metadata of the moment."""

    def __init__(self, network: LoRANetwork, facts: TrainingFacts, precision: str | None) -> None:
        self._network = network
        self._facts = facts
        self._dtype = dtype_named(precision or "float")  # None: as trained, in fp32

    def write(self, path: Path, moment: Moment) -> None:
        """Write the network as it is now. Raises StorageError, with what was at `path` untouched."""
        metadata = build_metadata(self._facts, step=moment.step, epoch=moment.epoch, now=time.time())
        save_network(path, self._network.export_state(self._dtype), metadata)


class PeriodicSave:
    """Saves the network every N epochs or steps; the file at the very end is `final_path`'s.

    Names are those of the reference tool: `<name>-000003.safetensors` after epoch 3 and
    `<name>-step00000100.safetensors` after step 100.
    """

    def __init__(self, options: SavingOptions, write: Write) -> None:
        self._options = options
        self._write = write

    def due(self, moment: Moment) -> bool:
        """Whether a periodic file is due; at the end of the run the final file takes its place."""
        return not moment.run_ended and bool(self._paths(moment))

    def run(self, moment: Moment) -> None:
        """Write the files that are due."""
        for path in self._paths(moment):
            self._write(path, moment)
            log.info("saved %s", path)

    def _paths(self, moment: Moment) -> list[Path]:
        options = self._options
        paths = []
        if Interval(epochs=options.save_every_n_epochs).hits(moment):
            paths.append(_path(options, f"-{moment.epoch:06d}"))
        if Interval(steps=options.save_every_n_steps).hits(moment):
            paths.append(_path(options, f"-step{moment.step:08d}"))
        return paths


def final_path(options: SavingOptions) -> Path:
    """Return the path of the network as it is at the end of training."""
    return _path(options, "")


def metrics_path(options: SavingOptions) -> Path:
    """Return the path of the metrics file."""
    return options.output_dir / f"{options.output_name}.metrics.jsonl"


def _path(options: SavingOptions, suffix: str) -> Path:
    return options.output_dir / f"{options.output_name}{suffix}.{options.save_model_as}"
