"""A run that is asked to stop saves a state and leaves with exit code 75."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from library.core.errors import Stopped
from library.data.batch import Batch
from library.training.objective import Objective
from library.training.state.checkpoint import read_state
from library.training.state.stop import StopRequest, StopSignals
from tests.reliability.legs import NAME, losses, same, states, weights

posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows cannot send these signals")


def wait_for(condition, process, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)


def lines(output: Path) -> int:
    file = output / f"{NAME}.metrics.jsonl"
    return file.read_text().count("loss/current") if file.exists() else 0


@posix_only
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_a_state_and_exits_with_75(start, tmp_path: Path, name: str) -> None:
    process = start(tmp_path, "--max_train_epochs=1000")
    wait_for(lambda: lines(tmp_path) >= 2, process)
    os.kill(process.pid, getattr(signal, name))
    process.join(120)
    assert process.exitcode == 75
    (state,) = states(tmp_path)
    assert read_state(tmp_path / f"{NAME}{state}").record.step == lines(tmp_path)


def test_the_stop_file_stops_and_is_removed(start, tmp_path: Path) -> None:
    stop_file = tmp_path / f"{NAME}.stop"
    stop_file.touch()  # one from before the run does not count
    process = start(tmp_path, "--max_train_epochs=1000")
    wait_for(lambda: lines(tmp_path) >= 1, process)
    assert not stop_file.exists()
    stop_file.touch()
    process.join(120)
    assert process.exitcode == 75
    assert len(states(tmp_path)) == 1
    assert not stop_file.exists()


@posix_only
def test_a_preview_is_broken_off_and_drawn_by_the_resumed_run(start, train, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1000 --d 1\n")
    flags = (f"--sample_prompts={prompts}", "--sample_every_n_steps=2", "--max_train_steps=2")
    process = start(tmp_path, *flags, "--max_train_epochs=1")
    wait_for(lambda: lines(tmp_path) >= 2, process)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    assert process.exitcode == 75
    assert not read_state(tmp_path / f"{NAME}-step00000002-state").record.events_done
    assert not (tmp_path / "sample").exists()
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    train(tmp_path, *flags, "--max_train_epochs=1", "--resume=latest")
    assert len(list((tmp_path / "sample").glob("*_000002_*.png"))) == 1


@posix_only
def test_a_signal_while_the_caches_are_filled_leaves_what_is_done(start, train, tmp_path: Path) -> None:
    cache = f"--cache_directory={tmp_path / 'cache'}"
    process = start(tmp_path / "out", cache, "--max_train_epochs=1")
    wait_for(lambda: any((tmp_path / "cache").rglob("*.safetensors")), process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    assert process.exitcode == 75
    assert states(tmp_path / "out") == []
    train(tmp_path / "out", cache, "--max_train_epochs=1", "--resume=latest")
    assert lines(tmp_path / "out") == 3


@posix_only
def test_signals_before_training_end_it_on_the_spot() -> None:
    signals = StopSignals()
    with signals.caught(), pytest.raises(Stopped, match="SIGTERM before the first step"):
        os.kill(os.getpid(), signal.SIGTERM)


@posix_only
def test_a_signal_that_falls_into_somebody_elses_code_ends_it_like_any_other() -> None:
    """As safetensors and torch do it: what is raised while they call back becomes an error of theirs."""

    class Tensor:
        def __len__(self) -> int:
            os.kill(os.getpid(), signal.SIGTERM)
            return 1

    with pytest.raises(Stopped, match="SIGTERM before the first step"), StopSignals().caught():
        try:
            len(Tensor())
        except Stopped as error:
            raise ValueError("could not determine the shape") from error
    with pytest.raises(ValueError, match="no signal"), StopSignals().caught():
        raise ValueError("no signal")


@posix_only
def test_a_second_signal_leaves_at_once_but_an_echo_of_the_first_does_not() -> None:
    now, left = [0.0], []
    signals = StopSignals(clock=lambda: now[0], leave=left.append)
    before = signal.getsignal(signal.SIGTERM)
    with signals.caught():
        signals.defer = True
        for now[0] in (0.0, 0.5):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGTERM"
        assert left == []
        now[0] = 3.0
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [130]
    assert signal.getsignal(signal.SIGTERM) == before


def test_reasons_to_stop(tmp_path: Path) -> None:
    signals = StopSignals()
    request = StopRequest(signals, tmp_path / "kiwi.stop", max_minutes=None)
    assert request.reason() is None
    assert request.interruptible(max)(1, 2) == 2
    request.stop_file.touch()
    assert request.reason() == "the file kiwi.stop"
    signals.received = "SIGUSR1"
    assert request.reason() == "SIGUSR1"
    with pytest.raises(Stopped):
        request.interruptible(max)(1, 2)
    assert (
        StopRequest(StopSignals(), tmp_path / "x", max_minutes=1e-9).reason() == "--max_train_minutes 1e-09"
    )
    assert StopRequest(StopSignals(), tmp_path / "x", max_minutes=60).reason() is None


def test_a_wish_to_stop_breaks_off_a_long_step(train, tmp_path: Path, monkeypatch) -> None:
    """Three batches a step: stopped after the second one of step 2, the run goes on from step 1."""
    flags = ("--gradient_accumulation_steps=3", "--max_train_epochs=3")
    train(tmp_path / "whole", *flags)
    real, seen = Objective.training_losses, []

    def training_losses(self: Objective, batch: Batch) -> torch.Tensor:
        seen.append(batch)
        if len(seen) == 5:
            (tmp_path / "out" / f"{NAME}.stop").touch()
        return real(self, batch)

    monkeypatch.setattr(Objective, "training_losses", training_losses)
    with pytest.raises(
        Stopped, match=r"Stopped by the file kiwi.stop in step 2\. A state of the moment before"
    ):
        train(tmp_path / "out", *flags)
    assert len(seen) == 5
    assert states(tmp_path / "out") == ["-step00000001-state"]
    train(tmp_path / "out", *flags, "--resume=latest")
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


@posix_only
def test_asked_to_stop_at_random_moments_the_run_ends_in_order_and_goes_on(
    start, whole, tmp_path: Path
) -> None:
    """Whatever it is doing, previews and saves included: it ends by itself, and nothing is done twice."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    flags = ("--ema", "--save_every_n_steps=1", f"--sample_prompts={prompts}", "--sample_every_n_steps=1")
    draw, output, codes = random.Random(), tmp_path / "out", []
    while 0 not in codes:
        process = start(output, *flags, "--resume=latest")
        process.join(draw.uniform(0.1, 1.0) if len(codes) < 8 else 120)
        if process.is_alive():
            os.kill(process.pid, signal.SIGTERM)
        process.join(120)
        codes.append(process.exitcode)
    assert set(codes) <= {0, 75, -signal.SIGTERM}  # the last before the program has begun
    assert same(weights(output), weights(whole))
    assert losses(output) == losses(whole)  # which asserts that each step is logged with one loss
    assert states(output) == ["-state"]
