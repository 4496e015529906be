"""examples/slurm.sh, with stand-ins for srun and scontrol."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from library.training.state.checkpoint import read_state
from tests.reliability import legs
from tests.reliability.legs import NAME, losses, states
from tests.warm_python import ColdPython, WarmPython

ROOT = Path(__file__).resolve().parents[2]
# Starts two tasks on this computer, and ends with the highest exit code of them, as srun does.
SRUN = """#!/bin/bash
shift
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NUM_TASKS=2 "$@" &
    tasks+=($!)
done
highest=0
for task in "${tasks[@]}"; do
    wait "$task"
    code=$?
    (( code > highest )) && highest=$code
done
exit $highest
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) echo localhost ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Slurm does not run on Windows")


@pytest.fixture
def submit(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that runs the script as Slurm does: `submit("--flag", PYTHON="...")`."""
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "out").mkdir()

    def run(*words: str, pass_fds: Sequence[int] = (), **more: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "OUTPUT_DIR": str(tmp_path / "out"),
            "OUTPUT_NAME": NAME,
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "REQUEUED": str(tmp_path / "requeued"),
            "PYTHON": sys.executable,
            "XDG_CACHE_HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            ["bash", "examples/slurm.sh", *words],
            cwd=ROOT,
            env=os.environ | environment | more,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=pass_fds,
        )

    return run


def wait_for(condition: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    while not condition():
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.01)


def stand_in(path: Path, body: str) -> str:
    """Write a program that takes Python's place."""
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (70, False), (75, True)])
def test_what_can_go_on_is_queued_again(
    submit: Callable[..., subprocess.Popen[str]], tmp_path: Path, code: int, requeued: bool
) -> None:
    job = submit(PYTHON=stand_in(tmp_path / "python", f"exit {code}"))
    assert job.wait(100) == code, job.communicate()[1]
    assert (tmp_path / "requeued").exists() == requeued


def test_a_launcher_may_lose_the_exit_code(
    submit: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    waiting = (
        f"touch {tmp_path}/begun; while [[ ! -e {tmp_path}/out/{NAME}.stop ]]; do sleep 0.05; done; exit 1"
    )
    job = submit(PYTHON=stand_in(tmp_path / "python", waiting))
    wait_for((tmp_path / "begun").exists, job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(100) == 1
    assert (tmp_path / "requeued").read_text() == f"{os.getpid()}\n"


def test_a_run_of_two_tasks_goes_on_where_its_time_was_up(
    submit: Callable[..., subprocess.Popen[str]], nano, python: WarmPython | ColdPython, tmp_path: Path
) -> None:
    """With tasks whose Python is warm, where it can be."""
    warm = {}
    if isinstance(python, WarmPython):
        line = python.line.fileno()
        body = f'exec {sys.executable} tests/warm_python.py {line} "$@"'
        warm = {"PYTHON": stand_in(tmp_path / "python", body), "pass_fds": [line]}
    dataset = legs.write_dataset(tmp_path / "photos", pictures=4, batch_size=1)
    words = legs.words(nano, dataset, tmp_path / "out", "--console_log_level=INFO")
    words = [word for word in words if not word.startswith("--max_train_epochs")]
    job = submit(*words, "--max_train_steps=3000", **warm)
    metrics = tmp_path / "out" / f"{NAME}.metrics.jsonl"
    wait_for(lambda: metrics.exists() and "loss/current" in metrics.read_text(), job)
    job.send_signal(signal.SIGUSR1)
    messages = job.communicate(timeout=200)[1]
    assert job.returncode == 75, messages
    assert messages.count("2 process(es)") == 1
    assert (tmp_path / "requeued").exists()
    (state,) = states(tmp_path / "out")
    step = read_state(tmp_path / "out" / f"{NAME}{state}").record.step
    job = submit(*words, f"--max_train_steps={step + 1}", **warm)
    assert job.wait(200) == 0, job.communicate()[1]
    assert sorted(losses(tmp_path / "out")) == list(range(1, step + 2))
