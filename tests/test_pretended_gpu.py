"""What needs a GPU, on a pretended one: see `tests/pretended_gpu`. It takes a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.pretended_gpu.build import COMPILER, can_build
from tests.training.assembled import command, write_pictures

ROOT = Path(__file__).resolve().parents[1]
WITH_GPU_TESTS = ("attention", "block_swap", "offload", "quant", "two_way_swap")

pytestmark = [
    pytest.mark.skipif(not can_build(), reason=f"needs {COMPILER}"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA of its own"),
]


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return subprocess.run(
        [sys.executable, "-m", "tests.pretended_gpu", *words],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables,
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


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
SWAP = ("--blocks_to_swap=3", "--use_pinned_memory_for_block_swap")


def test_two_processes_train_the_same_swapped_and_sharded(
    nano: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a GPU of its own, as on a computer of its own; their gradients meet there."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    config, weights = write_pictures(tmp_path / "pictures"), []
    for name, flags, variables in (("swapped", SWAP, {}), ("sharded", (), FSDP)):
        words = command(nano, config, tmp_path / name, "--mixed_precision=bf16", *flags)
        run_two("lumina_train_network.py", *words, **variables)
        weights.append(load_file(tmp_path / name / "run.safetensors"))
    swapped, sharded = weights
    assert swapped.keys() == sharded.keys()
    assert all(torch.equal(tensor, sharded[name]) for name, tensor in swapped.items())


def run_two(*words: str, **variables: str) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    with ThreadPoolExecutor() as both:
        runs = [both.submit(run, *words, **place, **variables, RANK=str(rank)) for rank in range(2)]
    for result in (each.result() for each in runs):
        assert result.returncode == 0, result.stdout + result.stderr
