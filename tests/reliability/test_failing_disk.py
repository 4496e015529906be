"""A disk that refuses a write costs that write: training goes on, and only a last save that fails ends it."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from library.core import files
from library.core.errors import StorageError
from library.core.files import require_room
from library.options.saving import SavingOptions
from library.options.state import StateOptions
from library.training.events import Moment
from library.training.output.saving import PeriodicSave
from library.training.state import checkpoint, contents
from library.training.state.checkpoint import find_resumed
from library.training.state.contents import RunFacts, StateSaver, weights_part
from library.training.watch.metrics import Metrics
from library.training.watch.trackers import JsonLines
from tests.reliability.legs import NAME, losses, same, states, weights


class Disk:
    """Counts the calls that write, flush or rename, and lets those numbered `failing` fail (from 0)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        self.code, self.calls, self.failing = code, 0, range(0)
        for name in ("fsync", "rename", "replace"):
            monkeypatch.setattr(files.os, name, self._checked(getattr(os, name)))
        monkeypatch.setattr(files.tempfile, "mkstemp", self._checked(files.tempfile.mkstemp))
        monkeypatch.setattr(files.os, "fdopen", self._opened(os.fdopen))
        monkeypatch.setattr(contents, "open", self._opened(open), raising=False)
        monkeypatch.setattr(checkpoint.Path, "write_text", self._checked(Path.write_text))

    def _check(self) -> None:
        self.calls += 1
        if self.calls - 1 in self.failing:
            raise OSError(self.code, os.strerror(self.code))

    def _checked(self, real: Callable) -> Callable:
        def call(*arguments, **named):
            self._check()
            return real(*arguments, **named)

        return call

    def _opened(self, real: Callable) -> Callable:
        def open_file(file: int | Path, mode: str) -> _Handle:
            return _Handle(real(file, mode), self._check)

        return open_file


class _Handle:
    """An open file whose writes can fail."""

    def __init__(self, real, check: Callable[[], None]) -> None:
        self._real, self._check = real, check
        self.flush, self.fileno = real.flush, real.fileno

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self._real.close()

    def write(self, content: bytes) -> None:
        self._check()
        self._real.write(content)


@pytest.fixture(params=[errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch, request.param)


class Saves:
    """The saves of a run: a network file and a state after each step, the last of the one and two kept."""

    def __init__(self, folder: Path) -> None:
        self.saving = SavingOptions(
            output_dir=folder, output_name=NAME, save_every_n_steps=1, save_last_n_files=1
        )
        facts = RunFacts(run="r", seed=1, world=1, steps_per_epoch=100, dataset="", settings={})
        options = StateOptions(save_state=True, save_last_n_steps_state=1)
        parts = {"network": weights_part(nn.Linear(2, 2))}
        self.files = PeriodicSave(self.saving, self._write, total_epochs=1)
        self.states = StateSaver(options, self.saving, facts, parts, total_epochs=1)

    def after(self, step: int) -> str | None:
        """Do the saves after a step as a run does; return what is said of a state that was not saved."""
        moment = Moment(step=step, epoch=1, epoch_ended=False, run_ended=False)
        self.files.run(moment)
        try:
            self.states.save(moment)
        except StorageError as error:
            return str(error)
        return None

    def newest(self) -> int:
        return find_resumed(StateOptions(resume="latest"), self.saving).record.step

    def networks(self) -> set[bytes]:
        return {path.read_bytes() for path in self.saving.output_dir.glob("*.safetensors")}

    def _write(self, path: Path, moment: Moment) -> list[Path]:
        files.write_bytes(path, b"network %d" % moment.step)
        return [path]


def test_each_call_fails_once(disk: Disk, tmp_path: Path) -> None:
    told = []
    for failing in range(100):
        folder = tmp_path / str(failing)
        saves = Saves(folder)
        saves.after(1), saves.after(2)
        disk.calls, disk.failing = 0, range(failing, failing + 1)
        told.append(saves.after(3))
        disk.failing = range(0)
        if disk.calls <= failing:
            break
        assert saves.newest() in (2, 3)
        assert saves.networks() & {b"network 2", b"network 3"}  # what fails removes nothing
        assert not list(folder.glob(".*"))
        assert saves.after(4) is None
        assert saves.newest() == 4
        assert b"network 4" in saves.networks()
    assert failing > 12
    assert told.count(None) < len(told) - 6  # the others were network files, or the last was none
    for sentence in filter(None, told):
        assert f"{NAME}-step00000003-state: " in sentence
        assert ("MiB are free" in sentence) == (disk.code == errno.ENOSPC)


def test_a_run_outlives_a_disk_that_is_full_for_a_while(
    train, whole, tmp_path: Path, monkeypatch, capfd
) -> None:
    """From a save after step 2 to one after step 3: a save ends at its first failure."""
    disk = Disk(monkeypatch, errno.ENOSPC)
    disk.failing = range(60, 64)
    train(tmp_path, "--ema", "--save_state", "--save_every_n_steps=1")
    assert disk.calls > 80
    assert same(weights(tmp_path), weights(whole))
    assert losses(tmp_path) == losses(whole)
    said = capfd.readouterr().err
    assert "kiwi-step0000000" in said and "the disk is full" in said
    assert "Training goes on, and the next state is tried when it is due." in said
    assert "Training goes on, and the next file is tried when it is due." in said
    assert "-state" in states(tmp_path)


def test_a_run_whose_last_save_fails_ends_with_74(train, tmp_path: Path, monkeypatch) -> None:
    real = PeriodicSave.due

    def due(self: PeriodicSave, moment: Moment) -> bool:
        if moment.run_ended:
            disk.failing = range(10**9)
        return real(self, moment)

    disk = Disk(monkeypatch, errno.ENOSPC)
    monkeypatch.setattr(PeriodicSave, "due", due)
    with pytest.raises(StorageError, match=r"kiwi\.safetensors: the disk is full") as caught:
        train(tmp_path, "--save_state", "--save_every_n_steps=1")
    assert caught.value.exit_code == 74
    disk.failing = range(0)
    monkeypatch.setattr(PeriodicSave, "due", real)
    assert states(tmp_path)[-1] == "-step00000005-state"
    train(tmp_path, "--save_state", "--save_every_n_steps=1", "--resume=latest")
    assert (tmp_path / f"{NAME}.safetensors").exists()


def test_a_state_that_cannot_be_kept_when_stopped_ends_with_74(train, tmp_path: Path, monkeypatch) -> None:
    real, disk = StateSaver.save, Disk(monkeypatch, errno.ENOSPC)

    def save(self: StateSaver, *given: object, **named: object) -> list[Path]:
        disk.failing = range(10**9)
        return real(self, *given, **named)

    monkeypatch.setattr(StateSaver, "save", save)
    with pytest.raises(StorageError, match="the disk is full"):
        train(tmp_path, "--max_train_minutes=1e-9")


def test_room_is_asked_for_before_writing(tmp_path: Path) -> None:
    require_room(tmp_path / "new folder" / "file", 1000, "")
    with pytest.raises(
        StorageError, match=r"file: it needs .* MiB and the disk has .* MiB free\. Make room\."
    ):
        require_room(tmp_path / "file", 2**60, "Make room.")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on file sizes")
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_file_that_may_not_grow_is_a_storage_error(train, tmp_path: Path, ending: str) -> None:
    """The system's own refusal, as of a full disk, in the middle of a file."""
    import resource

    train(tmp_path / "cached", "--max_train_epochs=1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=rf"kiwi\.{ending}: file too large"):
            train(tmp_path / "out", "--max_train_epochs=1", f"--save_model_as={ending}", "--network_dim=32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "out").glob(".*")) and not list((tmp_path / "out").glob(f"*.{ending}"))


# --- metrics ---


def test_metrics_wait_for_room(tmp_path: Path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("flow_scripts"), "propagate", True)
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, "s")
    metrics = Metrics([lines], total_steps=5, window=5, shown=False)
    real = lines._file

    class Full:
        def write(self, content: bytes) -> int:
            if len(content) < 60:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real.write(content[:40])  # as much as there is room for

    for step in range(1, 6):
        lines._file = real if step in (1, 4, 5) else Full()
        metrics.log(step, {"loss": 0.5})
    metrics.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert {record.getMessage() for record in caplog.records} == {
        "the numbers of step 2 could not be recorded: the disk is full"
    }


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {n}}}\n' for n in range(lines)) + '{"step": 9, "pad": "' + "x" * 9000)
    again = JsonLines(path, "s")
    again.log(9, {"loss": 0.5})
    again.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*range(lines), 9]
