"""`tests/random_runs.py` draws what it promises, and finds what is wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import random_runs
from tests.random_runs import Drawn, Outcome, differences, draw, findings


def test_the_same_seed_draws_the_same_command_lines():
    first, second = ([draw(chance) for _ in range(50)] for chance in (random.Random(5), random.Random(5)))
    assert first == second
    assert {drawn.script for drawn in first} == {
        "lumina_train.py",
        "lumina_train_network.py",
        "kandinsky5_train.py",
        "kandinsky5_train_network.py",
    }


def test_every_flag_that_is_drawn_exists():
    flags = {word.partition("=")[0] for drawn in map(draw, [random.Random(0)] * 300) for word in drawn.flags}
    known = (random_runs.ROOT / "docs" / "flags.md").read_text()
    assert {flag for flag in flags if flag.startswith("--") and f"`{flag}" not in known} == set()


@pytest.mark.parametrize(
    ("code", "said", "trouble"),
    [
        (0, "trained", ""),
        (2, "error: no.", ""),
        (71, "error: not enough.", ""),
        (1, "", "exit code 1: said nothing"),
        (-11, "begun", "exit code -11: begun"),
        (0, 'Traceback (most recent call last):\n  File "x"\nKeyError: 3\nsaved', "traceback: KeyError: 3"),
    ],
)
def test_what_is_wrong_is_said(code, said, trouble):
    assert Outcome(code, said, Path("it")).trouble == trouble


def test_weights_are_compared(tmp_path):
    weights = {"a": torch.ones(2), "b": torch.ones(())}
    changes = {"same": {}, "near": {"a": torch.full((2,), 1.00001)}, "more": {"c": torch.ones(2)}}
    for name, changed in changes.items():
        save_file(weights | changed, tmp_path / name)
    same, near, more = (tmp_path / name for name in changes)
    assert differences(same, same) == ""
    assert differences(same, near) == "1 of 2 tensors differ, such as a"
    assert differences(same, more) == "other names"


def test_a_command_line_runs_twice_and_its_weights_are_compared(tmp_path):
    drawn = Drawn("lumina", "lumina_train_network.py", ("--some=1",), ("--gradient_checkpointing",))

    class Runner:
        asked: list[tuple[str, ...]] = []

        def run(self, drawn, *more):
            self.asked.append(more)
            out = tmp_path / str(len(self.asked))
            out.mkdir()
            save_file({"a": torch.full((2,), float(len(more)))}, out / "it.safetensors")
            return Outcome(0, "trained", out / "it.safetensors")

    (found,) = findings(Runner(), drawn, pretended_gpu=False)
    assert Runner.asked == [(), ("--gradient_checkpointing",)]
    assert found.startswith("1 of 1 tensors differ") and "then with --gradient_checkpointing" in found


def test_a_real_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(random_runs, "draw", lambda chance: Drawn("lumina", "lumina_train_network.py", (
        "--network_module=networks.lora_lumina", "--network_dim=2", "--network_train_unet_only",
    ), ("--gradient_checkpointing",)))  # fmt: skip
    assert random_runs.main(["--minutes", "0", "--folder", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out == "1 command lines, 0 refused, 0 findings\n"
