"""What is made of how this process was started."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from library.core.dist import Processes
from library.core.errors import ConfigError
from library.core.launch import adopt_deepspeed, adopt_rank, compiler_wishes, several_processes_words

ROOT = Path(__file__).resolve().parents[2]
# Says which of how many processes it is. Its own words must not be taken for the launcher's.
PROGRAM = """
import os, sys
from library.core.entry import run_script
from library.core.launch import complete_launch
def main():
    complete_launch()
    who = f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}" if "RANK" in os.environ else "alone"
    print(f"[{who}] {sys.argv[1:]}", flush=True)
run_script(main)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("a launch") / "who.py"
    path.write_text(PROGRAM)
    return path


def launch(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=variables, timeout=100
    )


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
ACCELERATE = ("-m", "accelerate.commands.launch")


def test_accelerate_starts_as_many_as_it_is_asked_for(script: Path) -> None:
    words = ("--cpu", "--num_processes", 2, "--main_process_port", 0)
    done = launch(*ACCELERATE, *words, script, "--cpu", "a b")
    assert done.returncode == 0, done.stderr
    told = sorted(re.findall(r"\[\d of \d\]", done.stdout))
    assert told == ["[0 of 2]", "[1 of 2]"]
    assert done.stdout.count("['--cpu', 'a b']") == 2


def test_accelerate_starts_one_if_it_is_asked_for_one(script: Path) -> None:
    done = launch(*ACCELERATE, "--cpu", "--num_processes", 1, script, "x", MASTER_PORT="29999")
    assert done.stdout == "[alone] ['x']\n", done.stderr


def test_a_configuration_file_counts_like_the_words(script: Path, tmp_path: Path) -> None:
    config = tmp_path / "two.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\n"
        "num_machines: 1\nnum_processes: 2\nmachine_rank: 0\nmixed_precision: 'no'\nmain_process_port: 0\n"
    )
    done = launch(*ACCELERATE, "--config_file", config, script)
    told = sorted(re.findall(r"\[\d of \d\]", done.stdout))
    assert told == ["[0 of 2]", "[1 of 2]"], done.stderr


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        (
            "py /bin/accelerate launch --cpu --num_processes 2 x.py --cpu",
            "py /bin/accelerate launch --multi_gpu --num_processes 2 x.py --cpu",
        ),
        ("py /bin/accelerate-launch -m x.py --cpu", "py /bin/accelerate-launch --multi_gpu -m x.py --cpu"),
        ("bash run.sh", None),
        ("bash run.sh x.py --cpu", None),
        ("py /bin/accelerate launch y.py --gpu", None),
    ],
)
def test_the_words_that_start_several(launcher: str, expected: str | None) -> None:
    words = several_processes_words(launcher.split(), ["x.py", "--cpu"])
    assert words == (expected and expected.split())


def test_mpi_is_understood() -> None:
    environment = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        adopt_rank(dict(environment))
    environment |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "a"}
    adopt_rank(environment)
    wanted = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    assert wanted.items() <= environment.items()


def test_tasks_of_slurm_are_one_run_where_a_master_is_named(caplog: pytest.LogCaptureFixture) -> None:
    environment = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    adopt_rank(environment)
    assert "RANK" not in environment
    assert "srun started 2 tasks, and each is a run of its own" in caplog.text
    environment["MASTER_ADDR"] = "node1"
    adopt_rank(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("0", "2", "0")


def test_a_batch_script_of_slurm_is_alone() -> None:
    environment = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "MASTER_ADDR": "node1"}
    adopt_rank(environment)
    assert "RANK" not in environment


def deepspeed(**more: str) -> dict[str, str]:
    """Return what is left of accelerate's variables, after DeepSpeed's are translated."""
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", **more}
    adopt_deepspeed(environment)
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "false"
    return {name: environment[name] for name in FSDP if name in environment}


def test_stage_3_of_deepspeed_is_fsdp(tmp_path: Path) -> None:
    assert deepspeed(ACCELERATE_DEEPSPEED_ZERO_STAGE="3") == FSDP
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3}}')
    assert deepspeed(ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file), ACCELERATE_DEEPSPEED_ZERO_STAGE="2") == FSDP


def test_other_stages_of_deepspeed_are_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert deepspeed(ACCELERATE_DEEPSPEED_ZERO_STAGE="1") == {}
    assert deepspeed(ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="none") == {}
    assert "DeepSpeed's stage 1 has no effect" in caplog.text and "stage 2 has no effect" in caplog.text


def test_what_deepspeed_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--blocks_to_swap, without DeepSpeed"):
        deepspeed(ACCELERATE_DEEPSPEED_ZERO_STAGE="3", ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="cpu")
    with pytest.raises(ConfigError, match="no.json cannot be read"):
        deepspeed(ACCELERATE_DEEPSPEED_CONFIG_FILE=str(tmp_path / "no.json"))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"FSDP_VERSION": "1"}, "give accelerate `--fsdp_version 2`"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "--blocks_to_swap"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient_checkpointing"),
    ],
)
def test_settings_of_fsdp_that_are_not_used(
    monkeypatch: pytest.MonkeyPatch, setting: dict[str, str], sentence: str
) -> None:
    for name, value in (FSDP | setting).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=sentence):
        Processes.start()


@pytest.mark.parametrize(
    ("backend", "compiles", "said"),
    [
        (None, False, []),
        ("NO", False, []),
        ("INDUCTOR", False, ["dynamo_backend inductor of .* no effect: blocks are compiled with --torch_co"]),
        ("INDUCTOR", True, ["dynamo_backend inductor of .* other dynamo_ settings: --torch_compile and"]),
    ],
)
def test_compiling_by_accelerates_configuration_is_told_of(
    backend: str | None, compiles: bool, said: list[str]
) -> None:
    environment = {} if backend is None else {"ACCELERATE_DYNAMO_BACKEND": backend}
    found = list(compiler_wishes(environment, compiles=compiles))
    assert len(found) == len(said)
    assert all(re.search(pattern, sentence) for pattern, sentence in zip(said, found, strict=True))


def test_one_process_has_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    assert Processes.start().sharding is None
