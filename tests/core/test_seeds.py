"""Randomness is a function of (seed, purpose)."""

import subprocess
import sys

import torch

from library.core.seeds import derive, generator, rng, unit


def test_same_purpose_same_numbers_and_other_purpose_others():
    assert derive(1, "noise", 3) == derive(1, "noise", 3)
    assert len({derive(s, p, k) for s in range(5) for p in ("a", "b") for k in range(50)}) == 500
    assert derive(1, "a", 12) != derive(1, "a1", 2)


def test_draws_do_not_depend_on_hash_seed():
    code = "from library.core.seeds import derive; print(derive(7, 'order', 'x'))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": s}, capture_output=True, text=True
        ).stdout
        for s in ("1", "2")
    }
    assert runs == {f"{derive(7, 'order', 'x')}\n"}


def test_units_are_spread_evenly():
    values = [unit(0, "u", k) for k in range(4000)]
    assert 0 <= min(values) and max(values) < 1
    assert abs(sum(values) / len(values) - 0.5) < 0.02


def test_generators_leave_global_state_alone():
    before = torch.get_rng_state()
    a = torch.randn(4, generator=generator(5, "noise", 1))
    rng(5, "x").random()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a, torch.randn(4, generator=generator(5, "noise", 1)))
