"""Two processes from a user's command line: they end together, and one process goes on from their state."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from library.training.state.checkpoint import read_state
from tests.reliability import legs
from tests.reliability.legs import NAME, losses, states, weights, write_dataset

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("--network_dropout=0", "--lr_scheduler=constant", "--save_state_on_train_end")


# As in docs/multi_gpu.md. Without --multi_gpu, accelerate starts one process where there is no GPU, and the
# script starts the others; tests/core/test_launch.py has that.
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0"


@pytest.fixture
def started(nano, config: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Two processes with a batch of one each, in their first steps; they write to tmp_path / "two"."""
    dataset = write_dataset(tmp_path / "photos", pictures=6, batch_size=1)
    command = legs.words(nano, dataset, tmp_path / "two", *FLAGS, "--max_train_epochs=1000")
    environment = {"XDG_CACHE_HOME": str(config.parent.parent), "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(
        [sys.executable, *LAUNCH.split(), "lumina_train_network.py", *command],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "two" / f"{NAME}.metrics.jsonl"
    while launcher.poll() is None and not (metrics.exists() and "loss/current" in metrics.read_text()):
        time.sleep(0.01)
    yield launcher
    for process in processes_of(launcher):
        process.kill()
    launcher.kill()
    launcher.communicate()


def processes_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the training processes that are alive, by rank."""
    if launcher.poll() is not None:
        return []
    alive = [p for p in psutil.Process(launcher.pid).children() if p.status() != psutil.STATUS_ZOMBIE]
    return sorted(alive, key=lambda process: process.environ()["RANK"])


@pytest.fixture
def stopped(started: subprocess.Popen[str], tmp_path: Path) -> Path:
    """The output folder of two processes, stopped by a file."""
    (tmp_path / "two" / f"{NAME}.stop").touch()
    messages = started.communicate(timeout=60)[1]
    assert messages.count("Stopped by the file kiwi.stop after step") == 1, messages
    assert "exitcode  : 75" in messages, messages
    assert started.returncode == 1  # accelerate's; docs/multi_gpu.md says so
    return tmp_path / "two"


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot kill like this")
@pytest.mark.parametrize("victim", [0, 1])
def test_one_dies_and_all_end(started: subprocess.Popen[str], victim: int) -> None:
    processes = processes_of(started)
    assert len(processes) == 2
    begin = time.monotonic()
    processes[victim].send_signal(signal.SIGKILL)
    messages = started.communicate(timeout=60)[1]
    assert time.monotonic() - begin < 30
    assert started.returncode != 0
    assert not any(process.is_running() for process in processes)
    own = [line for line in messages.splitlines() if line.startswith("error: ")]
    assert len(own) == 1 and own[0].startswith(f"error: process {victim} died without a word"), messages
    assert "Connection closed by peer" not in messages


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send this signal")
def test_a_signal_to_one_stops_all(started: subprocess.Popen[str], tmp_path: Path) -> None:
    processes_of(started)[1].send_signal(signal.SIGTERM)
    messages = started.communicate(timeout=60)[1]
    assert messages.count("Stopped by SIGTERM after step") == 1, messages
    assert "exitcode  : 75" in messages, messages
    assert len(states(tmp_path / "two")) == 1


def test_a_mistake_that_all_meet_is_told_once(nano, config: Path, tmp_path: Path) -> None:
    command = legs.words(nano, config, tmp_path / "out", "--learning_rat=1")
    done = subprocess.run(
        [sys.executable, *LAUNCH.split(), "lumina_train_network.py", *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr.count("error: unknown argument '--learning_rat'; did you mean") == 1, done.stderr


def test_two_processes_stop_together_and_one_goes_on(nano, stopped: Path, tmp_path: Path) -> None:
    (state,) = states(stopped)
    step = read_state(stopped / f"{NAME}{state}").record.step
    assert step == len(losses(stopped))
    dataset = write_dataset(tmp_path / "photos", pictures=6, batch_size=2)
    steps = (*FLAGS, f"--max_train_steps={step + 2}")
    command_of = {"whole": (), "rest": (f"--resume={stopped / f'{NAME}{state}'}",)}
    for name, more in command_of.items():
        command = legs.words(nano, dataset, tmp_path / name, *steps, *more)
        legs.train([word for word in command if not word.startswith("--max_train_epochs")])
    rest, one = weights(tmp_path / "rest"), weights(tmp_path / "whole")
    assert sorted(losses(tmp_path / "rest")) == [step + 1, step + 2]
    for key, tensor in one.items():
        torch.testing.assert_close(rest[key], tensor, rtol=1e-3, atol=1e-4)
    history = read_state(tmp_path / "rest" / f"{NAME}-state").record.history
    assert any("1 process(es) instead of 2" in line for line in history)
    assert any("--train_batch_size is 2 from here on; it was 1" in line for line in history)
    assert not any("the dataset" in line or "an epoch has" in line for line in history)
