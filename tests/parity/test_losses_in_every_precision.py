"""Losses in every precision are those of the plain fp32 run, within the limits that docs/memory.md states."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.losses import MODES
from library.nn.weights.schemes import SCHEMES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("family", ["lumina", "kandinsky5"])
def test_losses_stay_near_those_in_fp32(
    family: str, run_script: Callable[..., object], tmp_path: Path
) -> None:
    """By the command that the table was made with, for one seed."""
    few = ("--family", family, "--seeds", 1, "--steps", 6)
    result = run_script("benchmarks/losses.py", *few, "--json", tmp_path / "found.json")
    assert result.code == 0, result.out + result.err
    rows = json.loads((tmp_path / "found.json").read_text())
    assert [row["mode"] for row in rows] == list(MODES)
    for row in rows:
        assert 0 < row["loss"] <= row["loss_limit"] and 0 < row["norm"] <= row["norm_limit"], row
    assert result.out.count(f"| {family} | ") == len(rows)


def test_every_precision_has_limits_and_the_docs_state_them() -> None:
    assert {f"--base_quant {scheme}" for scheme in SCHEMES} <= MODES.keys()
    told = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    for mode, (loss, norm) in MODES.items():
        row = rf"^\| `{mode}` \| .+ \| {loss * 100:g} % \| .+ \| {norm * 100:g} % \|$"
        assert re.search(row, told, re.MULTILINE), mode
