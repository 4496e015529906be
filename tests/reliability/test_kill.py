"""A run that is killed again and again ends with the network of the uninterrupted one."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.reliability import legs
from tests.reliability.legs import losses, same, weights

KILLS, SECONDS = 60, 45.0  # whichever comes first
EPOCHS = "--max_train_epochs=14"  # of three steps


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_run_killed_at_random_moments_gives_the_same_network(start, nano, config, tmp_path: Path) -> None:
    """Every kill costs the step it falls into, saves included; the bytes at the end are the same."""
    whole = tmp_path / "whole"
    legs.train(legs.words(nano, config, whole, "--ema", EPOCHS))
    flags = ("--ema", EPOCHS, "--save_state", "--save_every_n_steps=1", "--save_last_n_steps=3")
    draw, kills, began, output = random.Random(), 0, time.monotonic(), tmp_path / "killed"
    while True:
        process = start(output, *flags, "--resume=latest")
        more = kills < KILLS and time.monotonic() - began < SECONDS
        process.join(draw.uniform(0.1, 1.2) if more else 300)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert kills >= 10
    print(f"{kills} kills")
    assert same(weights(output), weights(whole))
    assert same(weights(output, "-ema"), weights(whole, "-ema"))
    assert losses(output) == losses(whole)
