"""Two processes stop together, and one process with twice the batch goes on from their state."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from library.training.state.checkpoint import read_state
from tests.reliability import legs
from tests.reliability.legs import NAME, losses, states, weights, write_dataset

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("--network_dropout=0", "--lr_scheduler=constant", "--save_state_on_train_end")


@pytest.fixture
def stopped(nano, config: Path, tmp_path: Path) -> Path:
    """The output folder of two processes with a batch of one each, stopped by a file."""
    dataset = write_dataset(tmp_path / "photos", pictures=6, batch_size=1)
    command = legs.words(nano, dataset, tmp_path / "two", *FLAGS, "--max_train_epochs=1000")
    # `accelerate launch --cpu --num_processes 2` starts a single process, without a word.
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2"
    environment = {
        "ACCELERATE_USE_CPU": "true",
        "XDG_CACHE_HOME": str(config.parent.parent),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, *launcher.split(), "lumina_train_network.py", *command],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "two" / f"{NAME}.metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and "loss/current" in metrics.read_text()):
        time.sleep(0.01)
    (tmp_path / "two" / f"{NAME}.stop").touch()
    messages = process.communicate(timeout=60)[1]
    assert "Stopped by the file kiwi.stop after step" in messages, messages
    assert "exitcode  : 75" in messages, messages
    return tmp_path / "two"


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
