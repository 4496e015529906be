"""benchmarks/gpu.py without a GPU: it runs to its end, tells what it cannot measure, and notes the rest."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--size", "nano", "--device", "cpu", "--family", "lumina", "--sides", "512", "--batches", "1")
SWAPPED = "outputs, half of the blocks swapped"


def run(*words):
    command = [sys.executable, "benchmarks/gpu.py", *SMALL, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def rows_of(output):
    """Return the cells of the rows that came one by one, by way."""
    rows = (line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| lumina |"))
    return {row[3]: row[4:] for row in rows}


def test_every_way_gets_a_row_and_its_loss_is_compared(tmp_path):
    ways = ("outputs", SWAPPED, "none, int8", "none, triton", "reference")
    done = run("--json", tmp_path / "found.json", "--ways", *ways)
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert set(rows) == {"none, fp32", "none", *ways}
    assert rows["none, triton"][0].startswith("not here: --fused_kernels triton cannot be used")
    for way in ("outputs", SWAPPED):  # what is only kept or placed in another way is the same, bit for bit
        seconds, share, ratio, peak, loss, gradient, to_fp32 = rows[way]
        assert (loss, gradient, peak) == ("0.0e+00", "0.0e+00", "-")
        assert float(seconds) > 0 and float(ratio) > 0 and float(share.rstrip("%")) > 0
    assert 0 < float(rows["none, int8"][4]) < 0.05
    assert 0 < float(rows["none"][6]) < 0.01
    assert f"| {SWAPPED} | " in done.stdout.partition("lumina: s/step")[2]
    found = json.loads((tmp_path / "found.json").read_text())
    times = found["device s: lumina, 512 px, batch 1, CPU"]["rows"]
    assert [row["name"] for row in times] == ["none", "outputs", "reference", SWAPPED, "none, int8"]
    assert times[0]["ratio"] == 1


@pytest.mark.parametrize(
    ("error", "said", "failed"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory", False),
        (RuntimeError("a kernel\nwas lost"), "FAILED: RuntimeError: a kernel was lost", True),
    ],
)
def test_what_one_way_cannot_do_is_said_in_its_row(error, said, failed, monkeypatch, capsys):
    from benchmarks.gpu import Bench
    from benchmarks.gpu_table import line
    from benchmarks.gpu_ways import KEEPING, Case

    def fail(self, case):
        raise error

    monkeypatch.setattr(Bench, "_measure", fail)
    case = Case("lumina", 512, 1, KEEPING[1])
    found = Bench("nano", torch.device("cpu"), time.monotonic() + 60, 1e9).measure(case)
    assert line(case, found, {case: found}).startswith(f"| lumina | 512 | 1 | selective | {said} | ")
    assert found.failed == failed
    assert ("Traceback" in capsys.readouterr().err) == failed  # where it happened, for whoever looks into it


def test_without_time_no_row_is_begun_and_a_wrong_name_is_told():
    done = run("--minutes", 0)
    assert done.returncode == 0, done.stderr
    assert "rows are left out: no time was left" in done.stdout and not rows_of(done.stdout)
    assert "| outputs | left out |" in done.stdout
    done = run("--ways", "non")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("There is no way 'non'; there are: none, fp32; none; selective;")
