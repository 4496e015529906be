"""What needs a GPU, on a pretended one: see `tests/pretended_gpu`. It takes a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.pretended_gpu.build import COMPILER, can_build

ROOT = Path(__file__).resolve().parents[1]
WITH_GPU_TESTS = ("attention", "block_swap", "offload", "quant", "two_way_swap")

pytestmark = [
    pytest.mark.skipif(not can_build(), reason=f"needs {COMPILER}"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA of its own"),
]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return subprocess.run(
        [sys.executable, "-m", "tests.pretended_gpu", *words],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "words",
    [
        ["tests/pretended_gpu/itself.py"],
        ["tests/pretended_gpu/runs.py"],
        ["tests/pretended_gpu/compiled.py"],
        ["-m", "gpu", *(f"tests/nn/test_{name}.py" for name in WITH_GPU_TESTS)],
    ],
    ids=["itself", "runs", "compiled", "gpu"],
)
def test_all_passes_on_it(words: list[str]) -> None:
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *words)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr
    assert " skipped" not in result.stdout


def test_no_test_of_a_gpu_is_forgotten() -> None:
    others = (path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
    marked = {path for path in others if "pytest.mark.gpu" in path.read_text()}
    assert marked == {ROOT / f"tests/nn/test_{name}.py" for name in WITH_GPU_TESTS}


def test_the_benchmark_runs_on_it() -> None:
    ways = (
        "outputs",
        "outputs, half of the blocks swapped",
        "full, nf4, all swapped",
        "none, attention varlen",
    )
    small = ("--size", "nano", "--sides", "512", "--batches", "1")
    result = run("benchmarks/gpu.py", *small, "--ways", *ways)
    assert result.returncode == 0, result.stdout + result.stderr
    for way in ways:
        assert result.stdout.count(f"| 1 | {way} |") == 2, way  # a row of each family
    assert "FAILED" not in result.stdout
