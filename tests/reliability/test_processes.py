"""Two processes from a user's command line: they end together, and one process goes on from their state."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from library.training.state.checkpoint import read_state
from tests.reliability import legs
from tests.reliability.legs import NAME, losses, states, weights, write_dataset
from tests.warm_python import ColdPython, WarmPython, rank_of

FLAGS = ("--network_dropout=0", "--lr_scheduler=constant", "--save_state_on_train_end")


# As in docs/multi_gpu.md. Without --multi_gpu, accelerate starts one process where there is no GPU, and the
# script starts the others; tests/core/test_launch.py has that.
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0"


class Launched:
    """A launcher that runs, what it writes, and the processes that it started."""

    def __init__(
        self, python: WarmPython | ColdPython, words: list[str], cache: Path, messages: Path
    ) -> None:
        environment = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
        self._messages = messages
        with messages.open("w") as err:
            self.script = python.start([*LAUNCH.split(), *words], environment, err=err.fileno())

    def ended(self, seconds: float = 200) -> str:
        """Wait until it has ended; return what was written."""
        self.script.join(seconds)
        assert self.script.exitcode is not None, self._messages.read_text()
        return self._messages.read_text()

    def processes(self) -> list[psutil.Process]:
        """Return the training processes that are alive, by rank."""
        if not self.script.is_alive():
            return []
        alive = [p for p in psutil.Process(self.script.pid).children() if p.status() != psutil.STATUS_ZOMBIE]
        return sorted((p for p in alive if rank_of(p) is not None), key=rank_of)


@pytest.fixture
def started(
    nano, config: Path, tmp_path: Path, python: WarmPython | ColdPython, request: pytest.FixtureRequest
) -> Iterator[Launched]:
    """Two processes with a batch of one each, in their first steps; they write to tmp_path / "two"."""
    dataset = write_dataset(tmp_path / "photos", pictures=6, batch_size=1)
    command = legs.words(nano, dataset, tmp_path / "two", *FLAGS, "--max_train_epochs=1000")
    words = ["lumina_train_network.py", *command]
    launched = Launched(
        getattr(request, "param", None) or python, words, config.parent.parent, tmp_path / "log"
    )
    metrics = tmp_path / "two" / f"{NAME}.metrics.jsonl"
    while launched.script.is_alive() and not (metrics.exists() and "loss/current" in metrics.read_text()):
        time.sleep(0.01)
    yield launched
    for process in launched.processes():
        process.kill()
    launched.script.kill()
    launched.script.join()


@pytest.fixture
def stopped(started: Launched, tmp_path: Path) -> Path:
    """The output folder of two processes, stopped by a file."""
    (tmp_path / "two" / f"{NAME}.stop").touch()
    messages = started.ended()
    assert messages.count("Stopped by the file kiwi.stop after step") == 1, messages
    assert "exitcode  : 75" in messages, messages
    assert started.script.exitcode == 1  # accelerate's; docs/multi_gpu.md says so
    return tmp_path / "two"


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot kill like this")
@pytest.mark.parametrize(("started", "victim"), [(ColdPython(), 0), (None, 1)], indirect=["started"])
def test_one_dies_and_all_end(started: Launched, victim: int) -> None:
    processes = started.processes()
    assert len(processes) == 2
    begin = time.monotonic()
    processes[victim].send_signal(signal.SIGKILL)
    messages = started.ended()
    assert time.monotonic() - begin < 30
    assert started.script.exitcode != 0
    assert not any(process.is_running() for process in processes)
    own = [line for line in messages.splitlines() if line.startswith("error: ")]
    assert len(own) == 1 and own[0].startswith(f"error: process {victim} died without a word"), messages
    assert "Connection closed by peer" not in messages


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send this signal")
def test_a_signal_to_one_stops_all(started: Launched, tmp_path: Path) -> None:
    started.processes()[1].send_signal(signal.SIGTERM)
    messages = started.ended()
    assert messages.count("Stopped by SIGTERM after step") == 1, messages
    assert "exitcode  : 75" in messages, messages
    assert len(states(tmp_path / "two")) == 1


def test_a_mistake_that_all_meet_is_told_once(nano, config: Path, tmp_path: Path) -> None:
    command = legs.words(nano, config, tmp_path / "out", "--learning_rat=1")
    words = ["lumina_train_network.py", *command]
    told = Launched(ColdPython(), words, config.parent.parent, tmp_path / "log").ended()
    assert told.count("error: unknown argument '--learning_rat'; did you mean") == 1, told


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
