"""State folders on disk: whole or not there, verified, pruned, and never lost to a kill or a full disk."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from library.core import files
from library.core.errors import CheckpointError, ConfigError, StorageError
from library.core.files import staged_directory, sweep_leftovers
from library.options.saving import SavingOptions
from library.options.state import StateOptions
from library.training.state.checkpoint import (
    Keep,
    StateRecord,
    check_state_folders,
    epoch_state_path,
    final_state_path,
    find_resumed,
    prune_states,
    read_state,
    remove_interim_states,
    saved_states,
    step_state_path,
    verify_state,
    write_state,
)


def saving(folder: Path) -> SavingOptions:
    return SavingOptions(output_dir=folder, output_name="kiwi [1]")


def record(step: int, serial: int | None = None, **other: object) -> StateRecord:
    given = {"name": "kiwi [1]", "run": "r1", "serial": step if serial is None else serial, "interim": False}
    given |= {"step": step, "events_done": True, "seed": 7, "world": 1, "steps_per_epoch": 10}
    return StateRecord(**(given | {"dataset": "d"} | other))


def write(folder: Path) -> None:
    for part in ("network", "optimizer"):
        (folder / f"{part}.safetensors").write_bytes(os.urandom(3000))


def save(folder: Path, step: int, serial: int | None = None, **other: object):
    return write_state(step_state_path(saving(folder), step), record(step, serial, **other), write)


def names(folder: Path) -> list[str]:
    return [state.path.name.removeprefix("kiwi [1]") for state in saved_states(saving(folder))]


def test_a_state_reads_back_as_it_was_written(tmp_path: Path) -> None:
    state = save(tmp_path, 5)
    again = read_state(state.path)
    verify_state(again)
    assert again.record == state.record
    assert set(again.record.files) == {"network.safetensors", "optimizer.safetensors"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [state.path.name]


def refusal(path: Path, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_resumed(StateOptions(resume=str(path)), saving(folder))
    return str(caught.value)


def test_what_is_no_state_is_told_with_what_to_resume(tmp_path: Path) -> None:
    network = tmp_path / "kiwi [1]-step00000005.safetensors"
    network.write_bytes(b"weights")
    missing, empty = tmp_path / "gone", tmp_path / "empty"
    empty.mkdir()
    what = {
        network: "is a file, and a state is a folder",
        missing: "no such folder",
        empty: "holds no state.json",
    }
    for path, reason in what.items():
        said = refusal(path, tmp_path)
        assert said.startswith(f"--resume {path}") and reason in said
        assert f"There is no state of 'kiwi [1]' in {tmp_path}" in said and "--network_weights" in said
    save(tmp_path, 5)
    newest = save(tmp_path, 40)
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"weights")
    for path in (other, missing, empty):
        assert refusal(path, tmp_path).endswith(
            f"The newest state of 'kiwi [1]' in {tmp_path} is this: --resume {newest.path}"
        )
    own = step_state_path(saving(tmp_path), 5)
    for path in (network, own / "network.safetensors", own / "state.json"):
        assert refusal(path, tmp_path).endswith(f"Give the state that it belongs to: --resume {own}")
    (empty / "random_states_0.pkl").write_bytes(b"")
    said = refusal(empty, tmp_path)
    assert "state of accelerate" in said and said.endswith(f"--resume {newest.path}")


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """1,000 bits anywhere in a state, its record with its numbers and flags included."""
    settings = {"learning_rate": 1e-05, "network_args": ["train_blocks=all"], "seed": None}
    state = save(tmp_path, 5, settings=settings)
    draw = random.Random(1)
    for _ in range(1000):
        file = state.path / draw.choice(["state.json", *sorted(state.record.files)])
        whole = file.read_bytes()
        place = draw.randrange(len(whole))
        flipped = bytes([whole[place] ^ (1 << draw.randrange(8))])
        file.write_bytes(whole[:place] + flipped + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=f"damaged: {file.name}|state.json is"):
            verify_state(read_state(state.path))
        file.write_bytes(whole)
    verify_state(read_state(state.path))


def test_mutated_records_give_our_errors_only(tmp_path: Path) -> None:
    state = save(tmp_path, 5)
    file, draw = state.path / "state.json", random.Random(2)
    whole = file.read_bytes()
    for _ in range(2000):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 5)):
            start = draw.randrange(len(content))
            cut = slice(start, start + draw.randrange(0, 30))
            content[cut] = draw.choice([b"", draw.randbytes(3), b"[" * 2000, b"NaN", b"-1", content[cut] * 2])
        file.write_bytes(content)
        if content != whole:
            with pytest.raises(CheckpointError):
                read_state(state.path)


def test_damaged_records_are_refused(tmp_path: Path) -> None:
    state = save(tmp_path, 5)
    file = state.path / "state.json"
    content = json.loads(file.read_text())
    spoilt = [
        *("", "{", "[]", "null", file.read_text()[:-20]),
        *(json.dumps(content | {"format": 2}), json.dumps(content | {"more": 1})),
        json.dumps({k: v for k, v in content.items() if k != "state"}),
        json.dumps(content | {"state": content["state"] | {"step": 6}}),
        "[" * 100_000,
    ]
    for text in spoilt:
        file.write_text(text)
        with pytest.raises(CheckpointError, match=r"state\.json"):
            read_state(state.path)
    assert saved_states(saving(tmp_path)) == []


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def told(name: str, real):
        def call(*arguments):
            what = f"/proc/self/fd/{arguments[0]}" if name == "fsync" else arguments[0]
            calls.append(f"{name} {Path(os.path.realpath(what)).name}")
            return real(*arguments)

        return call

    state = save(tmp_path, 1)
    staging, aside = files._hidden_folder("tmp"), files._hidden_folder("aside")
    for name in ("fsync", "rename"):
        monkeypatch.setattr(files.os, name, told(name, getattr(os, name)))
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, **_: calls.append(f"delete {path.name}"))
    save(tmp_path, 1, 2)
    if not sys.platform.startswith("linux"):
        return  # elsewhere a descriptor cannot be asked for its name
    written = [f"fsync {name}" for name in ("network.safetensors", "optimizer.safetensors", "state.json")]
    assert calls[1:-1] == [
        *written,
        f"fsync {staging}",
        f"rename {state.path.name}",
        f"rename {staging}",
        f"fsync {tmp_path.name}",
        f"delete {aside}",
    ]


@pytest.mark.parametrize("failing", ["write", "fsync", "rename"])
def test_a_failure_leaves_the_old_state_and_no_rubbish(tmp_path: Path, monkeypatch, failing: str) -> None:
    old = save(tmp_path, 1)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if failing != "write":
        monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(StorageError, match=r"kiwi.*the disk is full \([\d,.]+ MiB are free\)"):
        write_state(old.path, record(1, 9), fail if failing == "write" else write)
    monkeypatch.undo()
    verify_state(read_state(old.path))
    assert [p.name for p in tmp_path.iterdir()] == [old.path.name]


def test_the_old_state_is_put_back_if_the_new_one_cannot_take_its_place(tmp_path: Path, monkeypatch) -> None:
    old, real, calls = save(tmp_path, 1), os.rename, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(files.os, "rename", second_fails)
    with pytest.raises(StorageError, match="input/output error"):
        save(tmp_path, 1, 9)
    assert read_state(old.path).record.serial == 1
    sweep_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [old.path.name]


def test_a_state_that_a_kill_left_aside_is_found_again(tmp_path: Path) -> None:
    state = save(tmp_path, 1)
    aside = tmp_path / ".folder-aside-another-computer-7"
    aside.mkdir()
    state.path.rename(aside / state.path.name)
    assert saved_states(saving(tmp_path)) == []
    assert find_resumed(StateOptions(resume="latest"), saving(tmp_path)).record.step == 1
    state.path.rename(aside / state.path.name)
    assert find_resumed(StateOptions(resume=str(state.path)), saving(tmp_path)).record.step == 1


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_files_of_a_state_have_the_modes_that_the_umask_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()

    def secretive(folder: Path) -> None:
        write(folder)
        for file in folder.iterdir():
            file.chmod(0o600)  # as safetensors writes them

    state = write_state(step_state_path(saving(tmp_path), 1), record(1), secretive)
    assert {file.stat().st_mode for file in state.path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_long_paths_with_odd_names_work(tmp_path: Path) -> None:
    folder = tmp_path / ("ünïcode and spaces " * 10)[:120] / ("x" * 120)
    state = save(folder, 1)
    assert len(str(state.path)) > 240
    verify_state(find_resumed(StateOptions(resume="latest"), saving(folder)))


def test_latest_is_the_newest_that_is_whole(tmp_path: Path, caplog) -> None:
    options = StateOptions(resume="latest")
    assert find_resumed(options, saving(tmp_path)) is None
    # The newest is the one saved last, whatever its step: the run may go on from an earlier state.
    save(tmp_path, 30, serial=1), save(tmp_path, 20, serial=2)
    last = save(tmp_path, 10, serial=3)
    other = SavingOptions(output_dir=tmp_path, output_name="kiwi [1]-000003")  # also "kiwi [1]" after epoch 3
    write_state(final_state_path(other), record(99, 99, name=other.output_name), write)
    assert find_resumed(options, saving(tmp_path)).record.step == 10
    (last.path / "network.safetensors").unlink()
    assert find_resumed(options, saving(tmp_path)).record.step == 20
    for state in saved_states(saving(tmp_path)):
        (state.path / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="Every state of 'kiwi"):
        find_resumed(options, saving(tmp_path))


def test_latest_does_not_start_anew_if_the_only_record_is_damaged(tmp_path: Path) -> None:
    state = save(tmp_path, 5)
    (state.path / "state.json").write_text("")
    with pytest.raises(CheckpointError, match="Every state of 'kiwi"):
        find_resumed(StateOptions(resume="latest"), saving(tmp_path))


def test_what_is_no_state_of_this_name_is_never_touched(tmp_path: Path) -> None:
    options = saving(tmp_path)
    photos, other = final_state_path(options), epoch_state_path(options, 3)
    photos.mkdir()
    (photos / "photo.jpg").write_bytes(b"1")
    with pytest.raises(ConfigError, match="is no state of a run named"):
        check_state_folders(StateOptions(save_state=True), options)
    check_state_folders(StateOptions(), options)
    write_state(other, record(1, name="kiwi [1]-000003"), write)
    for path in (photos, other):
        with pytest.raises(StorageError, match="is no state of a run named 'kiwi"):
            write_state(path, record(5), write)
    assert (photos / "photo.jpg").exists()
    verify_state(read_state(other))


def test_pruning_keeps_what_is_wanted_and_two_at_least(tmp_path: Path) -> None:
    options = saving(tmp_path)
    for step in (10, 20, 30):
        write_state(epoch_state_path(options, step // 10), record(step, 2 * step), write)
        newest = save(tmp_path, step, 2 * step + 1)
    (tmp_path / "kiwi [1]-step00000001-state").mkdir()  # not ours: no record
    prune_states(options, Keep(), newest)
    assert len(saved_states(options)) == 6
    prune_states(options, Keep(epochs=2, steps=10), newest)
    assert names(tmp_path) == ["-000002-state", "-step00000020-state", "-000003-state", "-step00000030-state"]
    prune_states(options, Keep(epochs=1, steps=1), newest)
    assert len(saved_states(options)) == 2
    prune_states(options, Keep(epochs=1, steps=1), save(tmp_path, 90, 90))
    assert [state.record.step for state in saved_states(options)] == [30, 90]
    assert (tmp_path / "kiwi [1]-step00000001-state").is_dir()


def test_of_interim_states_two_stay_until_the_run_is_done(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2, run="r0", interim=True)  # of an earlier run of the same name
    for step in (3, 4, 5):
        newest = save(tmp_path, step, interim=True)
        prune_states(saving(tmp_path), Keep(), newest)
    assert names(tmp_path) == [f"-step{step:08d}-state" for step in (1, 2, 4, 5)]
    remove_interim_states(saving(tmp_path), "r1", spared=newest.path)
    assert names(tmp_path) == [f"-step{step:08d}-state" for step in (1, 2, 5)]


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    computer = files._computer()
    for number, kept in ((dead.pid, False), (os.getppid(), True)):
        for purpose in ("tmp", "trash"):
            (tmp_path / f".folder-{purpose}-{computer}-{number}").mkdir()
        (tmp_path / f".tmp-{computer}-{number}-abc_.safetensors").touch()
        aside = tmp_path / f".folder-aside-{computer}-{number}"
        (aside / ("replaced" if kept else "not replaced")).mkdir(parents=True)
    for name in (f".folder-tmp-another-computer-{dead.pid}", ".tmp-mine", "photos", "replaced"):
        (tmp_path / name).mkdir()
    sweep_leftovers(tmp_path)
    living = [name.name for name in tmp_path.glob(f".*-{computer}-*")]
    assert len(living) == 4 and all(str(os.getppid()) in name for name in living)
    others = sorted(path.name for path in tmp_path.iterdir() if path.name not in living)
    assert others == sorted(
        [f".folder-tmp-another-computer-{dead.pid}", ".tmp-mine", "not replaced", "photos", "replaced"]
    )


def test_staging_gives_no_folder_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), staged_directory(tmp_path / "state") as folder:
        (folder / "half").write_bytes(b"1")
        raise KeyError
    assert not list(tmp_path.iterdir())
