"""What the benchmarks share: a device that is not there is told, and figures are shown to be read."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.report import Result, Row, show

ROOT = Path(__file__).resolve().parents[1]
ON_A_DEVICE = ("gpu", "checkpointing", "full_step", "memory", "modes", "routing", "step")


def test_every_benchmark_with_a_device_is_tested_here():
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
    asking = {name for name, text in texts.items() if "add_model_arguments(parser" in text}
    asking |= {name for name, text in texts.items() if '"--device"' in text and "__main__" in text}
    assert asking == set(ON_A_DEVICE)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
@pytest.mark.parametrize("name", ON_A_DEVICE)
def test_a_device_that_is_not_there_is_told_in_a_sentence(name, device, monkeypatch, capsys):
    path = str(ROOT / "benchmarks" / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [path, "--device", device, "--size", "nano"])
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the script adds to
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert printed.err.startswith(f"Nothing to measure here: --device {device} cannot be used: ")
    assert printed.err.count("\n") == 1


def test_an_old_torch_is_told_before_it_is_imported(tmp_path):
    """The benchmark that is meant for other people's computers."""
    installed = tmp_path / "torch-2.8.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.8.0\n")
    (tmp_path / "torch.py").write_text("raise AttributeError('an old torch')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "benchmarks/gpu.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: torch 2.8.0 is installed"), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("in_ms", "line"),
    [
        (False, "| outside | 0.002 | 0.070 (0.060 .. 0.080) | 0.004 |"),
        (True, "| outside | 2.34 | 0.070 (0.060 .. 0.080) | 4.31 |"),
    ],
)
def test_figures_of_a_few_milliseconds_are_shown_as_such(in_ms, line, monkeypatch, tmp_path, capsys):
    """Beside committed ones in seconds, at the same pace."""
    before, now = (
        Result("A step", "thread seconds", [Row("outside", seconds, 0.07, 0.06, 0.08)], 100.0, 9)
        for seconds in (0.00431, 0.00234)
    )
    report.write([before], tmp_path / "it.json")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    show(now, "it", in_ms=in_ms)
    printed = capsys.readouterr().out
    assert line in printed and f"| | thread {'ms' if in_ms else 'seconds'} | " in printed
