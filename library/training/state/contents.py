"""What a run must remember to go on exactly: the parts' tensors and numbers, and when they are saved.

Order of data, noise, dropout and learning rate are functions of the step, so besides the step there are only
the tensors that training changes: network, optimizer, and what else is handed in as a part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from library.core.errors import CheckpointError
from library.core.files import explain, require_room
from library.core.log import logger
from library.core.suggest import shorten
from library.nn.weights.writer import bytes_of, plan_of
from library.options.saving import SavingOptions
from library.options.state import LATEST, StateOptions
from library.training.events import Interval, Moment
from library.training.guards import require_finite
from library.training.optim.optimizer import export_state, import_state
from library.training.state.checkpoint import (
    FROM_FILE,
    Keep,
    SavedState,
    StateRecord,
    epoch_state_path,
    final_state_path,
    prune_states,
    remove_interim_states,
    saved_states,
    step_state_path,
    write_state,
)

_log = logger("state")

Tensors = dict[str, Tensor]
Values = dict[str, object]  # as JSON keeps them, exactly


@dataclass(frozen=True)
class Part:
    """Something that training changes: how its tensors and numbers are taken, and how they are put back."""

    take: Callable[[], tuple[Tensors, Values]]
    put: Callable[[Tensors, Values], None]


def weights_part(module: nn.Module) -> Part:
    """Return the trained parameters of a module, bit for bit, as a part."""

    def put(tensors: Tensors, values: Values) -> None:
        own = dict(module.named_parameters())
        _check_names(tensors, own)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    return Part(lambda: ({name: p.detach() for name, p in module.named_parameters()}, {}), put)


def tensors_part(take: Callable[[], Tensors], put: Callable[[Tensors], None]) -> Part:
    """Return named tensors without numbers as a part."""
    return Part(lambda: (take(), {}), lambda tensors, values: put(tensors))


def optimizer_part(optimizer: torch.optim.Optimizer) -> Part:
    """Return what an optimizer remembers as a part; its settings are those of the new run."""
    return Part(
        lambda: export_state(optimizer), lambda tensors, values: import_state(optimizer, tensors, values)
    )


def numbers_part(take: Callable[[], Values], put: Callable[[Values], None]) -> Part:
    """Return numbers without tensors as a part."""
    return Part(lambda: ({}, take()), lambda tensors, values: put(values))


@dataclass(frozen=True)
class RunFacts:
    """What a state records of its run besides the parts; see StateRecord. `history`: changes on the way."""

    run: str
    seed: int
    world: int
    steps_per_epoch: int
    dataset: str
    settings: Mapping[str, object]
    history: Sequence[str] = ()


class StateSaver:
    """Saves the state of a run and puts it back.

    States that the options ask for come at intervals of steps and epochs. In between, and when the run has to
    stop, there are interim ones: the newest two are kept, and they go when the run is done.
    """

    def __init__(
        self,
        options: StateOptions,
        saving: SavingOptions,
        facts: RunFacts,
        parts: Mapping[str, Part],
        *,
        total_epochs: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options, self._saving = options, saving
        self._facts, self._parts = facts, parts
        epoch_interval = saving.epoch_interval(total_epochs)
        self._by_epoch = Interval(epochs=epoch_interval)
        self._by_step = Interval(steps=saving.save_every_n_steps)
        self._keep = Keep(
            epochs=options.save_last_n_epochs_state or saving.save_last_n_epochs,
            steps=options.save_last_n_steps_state or saving.save_last_n_steps,
            epoch_interval=epoch_interval or 1,
        )
        named = options.resume not in (None, LATEST)
        self._spared = Path(options.resume) if named else None  # another run may be meant to start from it
        self._clock = clock
        self._tried_at = clock()

    def due(self, moment: Moment) -> bool:
        """Whether a periodic state is due; for the one at the end of the run see `save_final`."""
        return self._options.save_state and not moment.run_ended and bool(self._periodic_paths(moment))

    def overdue(self) -> bool:
        """Whether the last state, or the last attempt to save one, is --save_state_every_n_minutes old."""
        minutes = self._options.save_state_every_n_minutes
        return minutes > 0 and self._clock() - self._tried_at >= 60 * minutes

    def save(self, moment: Moment, *, events_done: bool = True) -> list[Path]:
        """Save a state under the name of each interval that ends now, else an interim one.

        Args:
            events_done: False if saves, previews or validation of this moment were broken off; the resumed
                run then does them first.

        Raises:
            StorageError: it could not be written; older states are untouched.
            NonFiniteError: a weight is NaN or infinite; nothing is written.
        """
        paths = self._periodic_paths(moment) if self._options.save_state else []
        interim = not paths
        for path in paths or [step_state_path(self._saving, moment.step)]:
            self._commit(path, moment.step, interim=interim, events_done=events_done)
        return paths or [step_state_path(self._saving, moment.step)]

    def save_final(self, step: int) -> list[Path]:
        """Save the state at the end of training, if the options ask for it; return what was saved.

        Interim states are removed: the run is done.
        """
        paths = [final_state_path(self._saving)] if self._options.at_end else []
        for path in paths:
            self._commit(path, step, interim=False, events_done=True)
        remove_interim_states(self._saving, self._facts.run, self._spared)
        return paths

    def restore(self, state: SavedState) -> None:
        """Put a verified state back into the parts.

        Raises:
            CheckpointError: it does not fit the parts, or has gone since it was verified.
        """
        for name, part in self._parts.items():
            if name not in state.record.values:
                raise CheckpointError(
                    f"The state {state.path} has no part '{name}': it is of a run without one. Leave out "
                    f"what was added, or start anew from the saved file: {FROM_FILE}."
                )
            file = _file_name(name)
            try:
                tensors = load_file(state.path / file) if file in state.record.files else {}
                part.put(tensors, state.record.values[name])
            except (CheckpointError, SafetensorError) as error:
                raise CheckpointError(f"The state {state.path} does not fit this run: {error}") from error
            except OSError as error:
                raise CheckpointError(
                    f"The state {state.path}: {file} cannot be read: {explain(error)}."
                ) from error

    def _commit(self, path: Path, step: int, *, interim: bool, events_done: bool) -> None:
        self._tried_at = self._clock()
        taken = {name: part.take() for name, part in self._parts.items()}
        for name, (tensors, _) in taken.items():
            require_finite(tensors, f"the {name} after step {step}")
        needed = sum(t.nbytes for tensors, _ in taken.values() for t in tensors.values())
        require_room(path, needed, "Make room, or keep fewer states with --save_last_n_steps_state.")
        facts = self._facts
        record = StateRecord(
            name=self._saving.output_name,
            run=facts.run,
            serial=max((state.record.serial for state in saved_states(self._saving)), default=0) + 1,
            interim=interim,
            step=step,
            events_done=events_done,
            seed=facts.seed,
            world=facts.world,
            steps_per_epoch=facts.steps_per_epoch,
            dataset=facts.dataset,
            settings=dict(facts.settings),
            history=list(facts.history),
            values={name: values for name, (_, values) in taken.items()},
        )
        state = write_state(path, record, lambda folder: _write_tensors(folder, taken))
        _log.info("saved the state %s", path)
        prune_states(self._saving, self._keep, state, self._spared)

    def _periodic_paths(self, moment: Moment) -> list[Path]:
        paths = []
        if self._by_epoch.hits(moment):
            paths.append(epoch_state_path(self._saving, moment.epoch))
        if self._by_step.hits(moment):
            paths.append(step_state_path(self._saving, moment.step))
        return paths


def _write_tensors(folder: Path, taken: Mapping[str, tuple[Tensors, Values]]) -> None:
    """Write each part's tensors, one after another: those of a whole model have no room for copies of all."""
    for name, (tensors, _) in taken.items():
        if tensors:
            with open(folder / _file_name(name), "wb") as handle:
                plan_of(tensors).write_to(handle, lambda key, tensors=tensors: bytes_of(tensors[key]))


def _file_name(part: str) -> str:
    return f"{part}.safetensors"


def _check_names(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    odd = sorted(tensors.keys() ^ own.keys())
    if odd:
        raise CheckpointError(f"only one of them has {shorten(odd)}.")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise CheckpointError(
                f"'{name}' has shape {tuple(tensors[name].shape)} there and {tuple(tensor.shape)} here."
            )
