"""When the trained network is written, and under which name."""

from __future__ import annotations

import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from library.core.device import dtype_named
from library.core.errors import StorageError
from library.core.files import require_room, write_bytes
from library.core.log import logger
from library.options.saving import DIFFUSERS, SavingOptions
from library.training.events import Interval, Moment
from library.training.guards import require_finite
from library.training.output.ema import Ema
from library.training.output.metadata import TrainingFacts, build_metadata
from library.training.output.retention import Retention
from networks.files import save_network
from networks.formats import to_diffusers
from networks.lora import LoRANetwork
from networks.names import MAGNITUDE

log = logger("saving")

Write = Callable[[Path, Moment], list[Path]]

_ADVICE = "Make room, or keep fewer files with --save_last_n_files."


class NetworkFile:
    """Writes the trained network, and its running average beside it, with the metadata of the moment."""

    def __init__(
        self, network: LoRANetwork, facts: TrainingFacts, saving: SavingOptions, ema: Ema | None = None
    ) -> None:
        self._network = network
        self._ema = ema
        self._facts = facts
        self._format = saving.save_format
        self._dtype = dtype_named(saving.save_precision or "float")  # None: as trained, in fp32

    def write(self, path: Path, moment: Moment) -> list[Path]:
        """Write the network as it is now and return the files.

        Raises StorageError, or NonFiniteError for NaN in the weights, with what was at `path` untouched.
        """
        self._write(path, moment, weights="trained")
        if self._ema is None:
            return [path]
        average_path = path.with_name(f"{path.stem}-ema{path.suffix}")
        with self._ema.in_place():
            self._write(average_path, moment, weights="running average (EMA)")
        return [path, average_path]

    def _write(self, path: Path, moment: Moment, *, weights: str) -> None:
        state, settings = self._content()
        require_finite(state, f"the {weights} weights after step {moment.step}")
        require_room(path, sum(tensor.nbytes for tensor in state.values()), _ADVICE)
        if path.suffix != ".safetensors":  # a pickle, as torch writes it: it has no place for metadata
            content = BytesIO()  # torch itself would not say what the system has against a write
            torch.save(state, content)
            write_bytes(path, content.getbuffer())
            return
        metadata = build_metadata(self._facts, step=moment.step, epoch=moment.epoch, now=time.time())
        save_network(path, state, metadata | settings | {"ss_weights": weights})

    def _content(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the network's tensors under the names of its format, and settings for the metadata."""
        if self._format != DIFFUSERS:
            return self._network.export_state(self._dtype), {}
        adapter = to_diffusers(self._network.export_state(), "the network")  # fp32, to be rounded once
        tensors = adapter.prefixed("transformer")
        exact = {key: t if key.endswith(MAGNITUDE) else t.to(self._dtype) for key, t in tensors.items()}
        return exact, adapter.metadata()


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
    return options.output_dir / f"{options.output_name}{suffix}.{options.save_model_as}"
