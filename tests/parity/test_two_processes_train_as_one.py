"""Two processes with a batch of one each, on gloo, against one process with a batch of two."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.parity.runs import (
    Run,
    flags,
    pipeline_flags,
    recipe_flags,
    write_config,
    write_photos,
)

STEPS = 4


@dataclass(frozen=True)
class Two:
    """What two processes did: a run to compare, and one in fp16 with a single picture, so one has no work."""

    run: Run
    idle: Run


@pytest.fixture(scope="module")
def options(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A run with everything at which processes must wait for each other."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2", encoding="utf-8")
    return (
        pipeline_flags(pipeline)
        | recipe_flags()
        | {
            "max_train_steps": STEPS,
            "scheduled_sampling_max_step_offset": 4,
            "scheduled_sampling_probability": 0.7,
            "tread_routes": ("0:-1:0.5",),
            "cache_latents_to_disk": True,
            "cache_text_encoder_outputs_to_disk": True,
            "sample_prompts": folder / "prompts.txt",
            "sample_every_n_steps": 2,
            "save_every_n_epochs": 1,
        }
    )


@pytest.fixture(scope="module")
def one(
    options: dict[str, object],
    config: Path,
    train: Callable[..., Run],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    folder = tmp_path_factory.mktemp("cache_of_one")
    return train(options | {"dataset_config": config, "cache_directory": folder})


@pytest.fixture(scope="module")
def two(
    options: dict[str, object],
    photos: Path,
    tmp_path_factory: pytest.TempPathFactory,
    launch: Callable[[Sequence[object]], str],
) -> Two:
    folder = tmp_path_factory.mktemp("two")
    many = write_config(folder / "many.toml", photos, batch_size=1)
    single = write_config(folder / "single.toml", write_photos(folder / "single", ("cat",)), batch_size=1)
    swapping = {"blocks_to_swap": 4}  # which changes nothing, and each process does for itself
    jobs = [
        options
        | swapping
        | {"dataset_config": many, "cache_directory": folder / "cache", "output_dir": folder / "run"},
        options | {"dataset_config": single, "mixed_precision": "fp16", "output_dir": folder / "idle"},
    ]
    (folder / "jobs").write_text("".join(json.dumps(flags(job)) + "\n" for job in jobs), encoding="utf-8")
    # `accelerate launch --cpu --num_processes 2` starts a single process, without a word.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    log = launch([*launcher, "tests/parity/training_worker.py", folder / "jobs"])
    assert log.count("2 process(es)") == len(jobs)
    return Two(Run(folder / "run"), Run(folder / "idle"))


def test_losses_and_gradients(one: Run, two: Two) -> None:
    assert len(one.losses) == STEPS
    assert sum(line.get("rollout/pictures", 0) for line in two.run.metrics) > STEPS
    assert two.run.losses == pytest.approx(one.losses, rel=1e-5)
    assert two.run.norms == pytest.approx(one.norms, rel=1e-4)


def test_the_trained_lora(one: Run, two: Two) -> None:
    assert two.run.lora.keys() == one.lora.keys()
    for key, tensor in one.lora.items():
        assert (two.run.lora[key] - tensor).norm() <= 1e-4 * tensor.norm(), key


def test_one_process_writes_the_files(one: Run, two: Two) -> None:
    def names(run: Run) -> list[str]:
        """Without the time stamps of sample pictures."""
        return sorted(path.name.split("_2")[0] for path in run.folder.rglob("*") if path.is_file())

    assert names(two.run) == names(one)


def test_a_process_without_pictures_keeps_up(two: Two) -> None:
    assert len(two.idle.losses) == STEPS
    assert all(map(math.isfinite, two.idle.losses + two.idle.norms)) and min(two.idle.norms) > 0
    assert all(tensor.isfinite().all() for tensor in two.idle.lora.values())
