"""A run that is killed again and again ends with the network of the uninterrupted one."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.reliability import legs
from tests.reliability.legs import NAME, losses, same, weights

KILLS, SECONDS = 40, 15.0  # whichever comes first,
FEWEST = 10  # but not before as many
EPOCHS = "--max_train_epochs=10"  # of three steps


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_run_killed_at_random_moments_gives_the_same_network(start, nano, config, tmp_path: Path) -> None:
    """Every kill costs the step it falls into, saves included; the bytes at the end are the same.

    However fast the computer is, half of the kills come before the first step, and half after it.
    """
    whole, output = tmp_path / "whole", tmp_path / "killed"
    legs.train(legs.words(nano, config, whole, "--ema", EPOCHS))
    flags = ("--ema", EPOCHS, "--save_state", "--save_every_n_steps=1", "--save_last_n_steps=3")
    metrics = output / f"{NAME}.metrics.jsonl"
    draw, kills, began, half = random.Random(), 0, time.monotonic(), 0.15
    while True:
        before = metrics.stat().st_size if metrics.exists() else 0
        process = start(output, *flags, "--resume=latest")
        more = kills < FEWEST or (kills < KILLS and time.monotonic() - began < SECONDS)
        process.join(draw.uniform(0, 2 * half) if more else 300)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
        half *= 0.8 if metrics.exists() and metrics.stat().st_size > before else 1.25
    assert process.exitcode == 0
    assert kills >= FEWEST
    print(f"{kills} kills")
    assert same(weights(output), weights(whole))
    assert same(weights(output, "-ema"), weights(whole, "-ema"))
    assert losses(output) == losses(whole)
