"""State folders on disk: whole or not there, verified, pruned, and never lost to a kill or a full disk."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library.core import files
from library.core.errors import CheckpointError, StorageError
from library.core.files import staged_directory, sweep_leftovers
from library.options.saving import SavingOptions
from library.options.state import StateOptions
from library.training.state.checkpoint import (
    Keep,
    StateRecord,
    epoch_state_path,
    final_state_path,
    find_resumed,
    prune_states,
    read_state,
    require_space,
    saved_states,
    step_state_path,
    verify_state,
    write_state,
)


def saving(folder: Path) -> SavingOptions:
    return SavingOptions(output_dir=folder, output_name="kiwi [1]")


def record(step: int, serial: int | None = None) -> StateRecord:
    serial = step if serial is None else serial
    return StateRecord(step, True, serial, seed=7, world=1, steps_per_epoch=10, dataset="d")


def write(folder: Path) -> None:
    for part in ("network", "optimizer"):
        (folder / f"{part}.safetensors").write_bytes(os.urandom(3000))


def save(folder: Path, step: int, serial: int | None = None):
    return write_state(step_state_path(saving(folder), step), record(step, serial), write)


def test_a_state_reads_back_as_it_was_written(tmp_path: Path) -> None:
    state = save(tmp_path, 5)
    again = read_state(state.path)
    verify_state(again)
    assert again.record == state.record
    assert set(again.record.files) == {"network.safetensors", "optimizer.safetensors"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [state.path.name]


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    state = save(tmp_path, 5)
    draw = random.Random(1)
    for _ in range(100):
        file = state.path / draw.choice(sorted(state.record.files))
        whole = file.read_bytes()
        place = draw.randrange(len(whole))
        file.write_bytes(
            whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :]
        )
        with pytest.raises(CheckpointError, match=f"damaged: {file.name}"):
            verify_state(state)
        file.write_bytes(whole)
    verify_state(state)


def test_damaged_records_are_refused(tmp_path: Path) -> None:
    state = save(tmp_path, 5)
    file = state.path / "state.json"
    content = json.loads(file.read_text())
    spoilt = [
        *("", "{", "[]", "null", file.read_text()[:-20]),
        *(json.dumps(content | {"format": 2}), json.dumps(content | {"more": 1})),
        json.dumps({k: v for k, v in content.items() if k != "step"}),
    ]
    for text in spoilt:
        file.write_text(text)
        with pytest.raises(CheckpointError, match=r"state\.json"):
            read_state(state.path)
    assert saved_states(saving(tmp_path)) == []


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_sync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(files.os, "fsync", lambda fd: (calls.append("fsync"), real_sync(fd))[1])
    monkeypatch.setattr(files.os, "rename", lambda a, b: (calls.append("rename"), real_rename(a, b))[1])
    save(tmp_path, 1)
    folders = [] if os.name == "nt" else ["fsync"]
    assert calls == ["fsync"] * 3 + folders + ["rename"] + folders


@pytest.mark.parametrize("failing", ["write", "fsync", "rename"])
def test_a_failure_leaves_the_old_state_and_no_rubbish(tmp_path: Path, monkeypatch, failing: str) -> None:
    old = save(tmp_path, 1)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if failing != "write":
        monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(StorageError, match="kiwi.*the disk is full"):
        write_state(old.path, record(1, 9), fail if failing == "write" else write)
    monkeypatch.undo()
    verify_state(read_state(old.path))
    assert [p.name for p in tmp_path.iterdir()] == [old.path.name]


def test_room_is_asked_for_before_writing(tmp_path: Path) -> None:
    require_space(tmp_path / "new folder", 1000)
    with pytest.raises(StorageError, match="needs .* MiB and the disk has .* MiB free"):
        require_space(tmp_path, 2**60)


def test_latest_is_the_newest_that_is_whole(tmp_path: Path, caplog) -> None:
    options = StateOptions(resume="latest")
    assert find_resumed(options, saving(tmp_path)) is None
    # The newest is the one saved last, whatever its step: the run may go on from an earlier state.
    save(tmp_path, 30, serial=1), save(tmp_path, 20, serial=2)
    last = save(tmp_path, 10, serial=3)
    other = SavingOptions(output_dir=tmp_path, output_name="kiwi")
    write_state(final_state_path(other), record(99, 99), write)
    assert find_resumed(options, saving(tmp_path)).record.step == 10
    (last.path / "network.safetensors").unlink()
    assert find_resumed(options, saving(tmp_path)).record.step == 20
    for state in saved_states(saving(tmp_path)):
        (state.path / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="Every state of 'kiwi"):
        find_resumed(options, saving(tmp_path))


def test_pruning_keeps_what_is_wanted_and_two_at_least(tmp_path: Path) -> None:
    options = saving(tmp_path)
    for step in (10, 20, 30):
        write_state(epoch_state_path(options, step // 10), record(step, 2 * step), write)
        newest = save(tmp_path, step, 2 * step + 1)
    (tmp_path / "kiwi [1]-step00000001-state").mkdir()  # not ours: no record
    prune_states(options, Keep(), newest)
    assert len(saved_states(options)) == 6
    prune_states(options, Keep(epochs=2, steps=10), newest)
    names = [state.path.name.removeprefix("kiwi [1]") for state in saved_states(options)]
    assert names == ["-000002-state", "-step00000020-state", "-000003-state", "-step00000030-state"]
    prune_states(options, Keep(epochs=1, steps=1), newest)
    assert len(saved_states(options)) == 2
    prune_states(options, Keep(epochs=1, steps=1), save(tmp_path, 90, 90))
    assert [state.record.step for state in saved_states(options)] == [30, 90]
    assert (tmp_path / "kiwi [1]-step00000001-state").is_dir()


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    own = files._owned_name("tmp")
    swept = tmp_path / own.replace(str(os.getpid()), str(dead.pid))
    kept = [
        tmp_path / own.replace(str(os.getpid()), str(os.getppid())),
        tmp_path / f".folder-tmp-another-computer-{dead.pid}",
        tmp_path / "photos",
    ]
    for folder in (swept, *kept):
        folder.mkdir()
    sweep_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_staging_gives_no_folder_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), staged_directory(tmp_path / "state") as folder:
        (folder / "half").write_bytes(b"1")
        raise KeyError
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_thirty_times_while_saving_the_newest_state_is_always_whole(tmp_path: Path) -> None:
    options = SavingOptions(output_dir=tmp_path, output_name="kiwi")
    script = Path(__file__).with_name("save_forever.py")
    draw, reached = random.Random(), 0
    for _ in range(30):
        child = subprocess.Popen(
            [sys.executable, script, tmp_path, str(reached + 1)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.01 + 0.08 * draw.random())
        child.kill()
        child.wait()
        child.stdout.close()
        whole = saved_states(options)
        for state in whole:
            verify_state(state)
        assert len(whole) >= min(2, len(whole) and whole[-1].record.step)
        newest = whole[-1].record.step if whole else 0
        assert newest >= reached
        reached = newest
    assert reached >= 5
    assert len([p for p in tmp_path.iterdir() if p.name.startswith(".folder-")]) <= 1
