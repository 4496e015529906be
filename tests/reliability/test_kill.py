"""A run that is killed again and again ends with the network of the uninterrupted one."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.reliability.legs import losses, same, weights


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_run_killed_at_random_moments_gives_the_same_network(start, whole: Path, tmp_path: Path) -> None:
    flags = ("--ema", "--save_state", "--save_every_n_steps=1", "--resume=latest")
    draw, kills = random.Random(), 0
    while True:
        process = start(tmp_path, *flags)
        process.join(draw.uniform(0.3, 1.6) if kills < 5 else 60)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert kills > 0
    assert same(weights(tmp_path), weights(whole))
    assert same(weights(tmp_path, "-ema"), weights(whole, "-ema"))
    assert losses(tmp_path) == losses(whole)
