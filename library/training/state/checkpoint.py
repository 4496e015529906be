"""States on disk: folders that are complete or not there, found again, verified, and pruned. Torch-free.

A state is a folder of safetensors files and `state.json`, which is written last, lists the size and SHA-256
of each, and has a SHA-256 of its own. The folder appears under its name by one rename, after everything in it
is on the disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from library.core.errors import CheckpointError, ConfigError, StorageError
from library.core.files import explain, put_back, remove_directory, staged_directory
from library.core.hashing import sha256_file, sha256_text
from library.core.log import logger
from library.options.saving import SavingOptions
from library.options.state import LATEST, StateOptions

RECORD = "state.json"
FORMAT = 1
KEPT = 2  # the newest states of a run that no pruning removes

# How a run begins with what another one saved.
FROM_FILE = "--network_weights for a LoRA, --pretrained_model_name_or_path for a model"

_log = logger("state")


@dataclass(frozen=True)
class StateRecord:
    """What `state.json` says.

    name: the run's --output_name. run: the same in all legs of a run, and in no other run of that name.
    serial: counts the states of an output name; the newest has the highest.
    interim: it is there to go on from, and nobody has asked for it: it goes when the run is done.
    step: optimizer steps done, of which an epoch has `steps_per_epoch`.
    events_done: whether saves, previews and validation of this moment have happened.
    dataset: digest of everything that orders and makes the data. settings: flags of the run by name.
    history: a sentence for each change of settings on the way here. values: numbers of each part by name.
    """

    name: str
    run: str
    serial: int
    interim: bool
    step: int
    events_done: bool
    seed: int
    world: int
    steps_per_epoch: int
    dataset: str
    settings: dict[str, object] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    values: dict[str, dict[str, object]] = field(default_factory=dict)
    files: dict[str, dict[str, object]] = field(default_factory=dict)

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.steps_per_epoch


@dataclass(frozen=True)
class SavedState:
    """A committed state: its folder and its record."""

    path: Path
    record: StateRecord


def write_state(path: Path, record: StateRecord, write_files: Callable[[Path], None]) -> SavedState:
    """Commit a state. `write_files` puts the tensor files into the folder that it is given.

    Raises:
        StorageError: it could not be written, or something that is no state of this name is at `path`.
            Whatever was there is untouched.
    """
    if path.exists() and not _is_own(path, record.name):
        raise StorageError(_taken(path, record.name))
    with staged_directory(path) as folder:
        write_files(folder)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
            for file in sorted(folder.iterdir())
        }
        record = replace(record, files=files)
        (folder / RECORD).write_text(_as_text(record), encoding="utf-8")
    return SavedState(path, record)


def read_state(path: Path) -> SavedState:
    """Read a state's record.

    Raises:
        CheckpointError: there is no state, it is damaged, or it is one of another program or version.
    """
    file = Path(path) / RECORD
    if not file.is_file():
        raise CheckpointError(_no_state(Path(path)))
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {explain(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: it is not JSON ({error}).") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not the record of a state that this version can read.")
    state = content.get("state")
    if not isinstance(state, dict) or state.keys() != {f.name for f in fields(StateRecord)}:
        raise CheckpointError(f"{file} is damaged: its entries are not those of a state.")
    record = StateRecord(**state)
    if _as_text(record) != text:
        raise CheckpointError(f"{file} is damaged: it is not as it was written.")
    return SavedState(Path(path), record)


def _as_text(record: StateRecord) -> str:
    """Return the text of RECORD. Reading and writing gives the same text, so that no changed byte passes."""
    state = asdict(record)
    return json.dumps({"format": FORMAT, "sha256": sha256_text(json.dumps(state)), "state": state})


def verify_state(state: SavedState) -> None:
    """Compare every file of a state with its recorded size and digest.

    Raises:
        CheckpointError: one is missing, cannot be read, or is not as it was written.
    """
    for name, facts in state.record.files.items():
        file = state.path / name
        if not file.is_file():
            raise CheckpointError(f"The state {state.path} lacks its file {name}.")
        try:
            intact = file.stat().st_size == facts["bytes"] and sha256_file(file) == facts["sha256"]
        except OSError as error:
            raise CheckpointError(
                f"The state {state.path}: {name} cannot be read: {explain(error)}."
            ) from error
        if not intact:
            raise CheckpointError(f"The state {state.path} is damaged: {name} is not as it was written.")


def find_resumed(options: StateOptions, saving: SavingOptions) -> SavedState | None:
    """Return the verified state that `--resume` means; None without it, or if 'latest' finds none.

    Raises:
        CheckpointError: the named state is not there or damaged, or every state that is there is damaged.
    """
    if options.resume is None:
        return None
    if options.resume == LATEST:
        return _latest(saving)
    path = Path(options.resume)
    put_back(path.parent)
    if not (path / RECORD).is_file():
        raise CheckpointError(f"--resume {_no_state(path)} {_what_to_resume(path, saving)}")
    state = read_state(path)
    verify_state(state)
    return state


def saved_states(saving: SavingOptions) -> list[SavedState]:
    """Return the readable states of an output name, oldest first."""
    states = []
    for path in _state_folders(saving):
        try:
            state = read_state(path)
        except CheckpointError:
            continue
        if state.record.name == saving.output_name:
            states.append(state)
    return sorted(states, key=lambda state: state.record.serial)


def check_state_folders(options: StateOptions, saving: SavingOptions) -> None:
    """Raise ConfigError if states are to be saved, and a folder with a name for one is something else."""
    for path in _state_folders(saving) if options.at_end else ():
        if not _is_own(path, saving.output_name):
            raise ConfigError(_taken(path, saving.output_name))


@dataclass(frozen=True)
class Keep:
    """Which states stay: those of the last N saves by epoch, those of the last N steps. None: all."""

    epochs: int | None = None
    steps: int | None = None
    epoch_interval: int = 1  # epochs from one save to the next

    def wants(self, epoch: int | None, step: int | None, newest: StateRecord) -> bool:
        """Whether a state named by its epoch or its step (None: not so named) stays beside the newest one."""
        if epoch is not None and self.epochs is not None:
            return epoch > newest.epoch - self.epochs * self.epoch_interval
        if step is not None and self.steps is not None:
            return step >= newest.step - self.steps
        return True


def prune_states(saving: SavingOptions, keep: Keep, newest: SavedState, spared: Path | None = None) -> None:
    """Remove states of the run that nobody wants any more, now that `newest` is committed.

    The newest two always stay, and so does the one at `spared`.
    """
    for state in _states_of_run(saving, newest.record.run)[:-KEPT]:
        unwanted = state.record.interim or not keep.wants(*_place_in_name(saving, state.path), newest.record)
        if unwanted and state.path != spared:
            _remove(state.path)


def remove_interim_states(saving: SavingOptions, run: str, spared: Path | None = None) -> None:
    """Remove the states that were there to go on from, now that the run is done; `spared` stays."""
    for state in _states_of_run(saving, run):
        if state.record.interim and state.path != spared:
            _remove(state.path)


def step_state_path(saving: SavingOptions, step: int) -> Path:
    """Return the folder of the state after `step` steps."""
    return saving.output_dir / f"{saving.output_name}-step{step:08d}-state"


def epoch_state_path(saving: SavingOptions, epoch: int) -> Path:
    """Return the folder of the state after `epoch` epochs."""
    return saving.output_dir / f"{saving.output_name}-{epoch:06d}-state"


def final_state_path(saving: SavingOptions) -> Path:
    """Return the folder of the state at the end of training."""
    return saving.output_dir / f"{saving.output_name}-state"


def _latest(saving: SavingOptions) -> SavedState | None:
    put_back(saving.output_dir)
    damaged = False
    for path in _state_folders(saving):
        try:
            read_state(path)
        except CheckpointError as error:
            _log.warning("left aside: %s", error)
            damaged |= (path / RECORD).exists()
    for state in reversed(saved_states(saving)):
        try:
            verify_state(state)
        except CheckpointError as error:
            _log.warning("%s The one before it is tried.", error)
            damaged = True
        else:
            return state
    if damaged:
        raise CheckpointError(
            f"Every state of '{saving.output_name}' in {saving.output_dir} is damaged. To start anew, leave "
            f"out --resume; the last saved file can be a start: {FROM_FILE}."
        )
    return None


def _states_of_run(saving: SavingOptions, run: str) -> list[SavedState]:
    return [state for state in saved_states(saving) if state.record.run == run]


def _state_folders(saving: SavingOptions) -> Iterator[Path]:
    pattern = re.compile(re.escape(saving.output_name) + r"(-step\d+|-\d+)?-state")
    if saving.output_dir.is_dir():
        for path in sorted(saving.output_dir.iterdir()):
            if path.is_dir() and pattern.fullmatch(path.name):
                yield path


def _is_own(path: Path, name: str) -> bool:
    """Whether `path` is a state of this output name, as far as it can still be read."""
    try:
        return read_state(path).record.name == name
    except CheckpointError:
        return (path / RECORD).is_file()


def _taken(path: Path, name: str) -> str:
    return (
        f"{path} is there already and is no state of a run named '{name}', so it is not replaced. Move it "
        f"away, or choose another --output_name."
    )


def _place_in_name(saving: SavingOptions, path: Path) -> tuple[int | None, int | None]:
    """Return the epoch or the step that a state is named by."""
    when = path.name.removeprefix(saving.output_name).removesuffix("-state").removeprefix("-")
    if when.startswith("step"):
        return None, int(when.removeprefix("step"))
    return (int(when) if when else None), None


def _remove(path: Path) -> None:
    try:
        remove_directory(path)
    except OSError as error:
        _log.warning("the old state %s could not be removed: %s", path, explain(error))
    else:
        _log.info("removed the old state %s", path)


def _no_state(path: Path) -> str:
    if not path.exists():
        return f"{path}: there is no such folder."
    if path.is_file():
        return f"{path} is a file, and a state is a folder."
    if (path / "train_state.json").exists() or (path / "random_states_0.pkl").exists():
        return (
            f"{path} is a state of accelerate (sd-scripts), which holds pickled files: it cannot be resumed."
        )
    return f"{path} holds no {RECORD}, so it is not a state."


def _what_to_resume(path: Path, saving: SavingOptions) -> str:
    """Return what to give in place of `path`: the state that it is of, else the newest one, else no state."""
    if path.is_file():
        for folder in (path.parent, path.with_name(f"{path.stem}-state")):
            if (folder / RECORD).is_file():
                return f"Give the state that it belongs to: --resume {folder}"
    states, where = saved_states(saving), f"of '{saving.output_name}' in {saving.output_dir}"
    if states:
        return f"The newest state {where} is this: --resume {states[-1].path}"
    return (
        f"There is no state {where}; with --save_state a run leaves folders whose names end in -state. What "
        f"was saved in a file can be a start: {FROM_FILE}."
    )
