"""A model spread over two processes by FSDP2 trains, validates and draws bit for bit as a whole one."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageChops

from library.core.errors import ConfigError
from library.training.run import TrainingRun
from library.training.state.stop import StopSignals
from tests.reliability import legs
from tests.reliability.legs import NAME, losses, same, weights
from tests.training.nano_runs import Runs
from tests.warm_python import ColdPython, WarmPython

LAUNCHER = "-m accelerate.commands.launch --use_fsdp --fsdp_version 2 --num_processes 2 --main_process_port 0"


def write_dataset(folder: Path) -> Path:
    """Write three pictures to train on, so that one has no partner, and one that is held out.

    One of the three trains towards the untrained model.
    """
    folder.mkdir()
    for number, part in enumerate(("train", "train", "keep", "held")):
        (folder / part).mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (60 * number, 90, 200)).save(folder / part / f"{number}.png")
        (folder / part / f"{number}.txt").write_text(f"picture {number}")
    config = folder / "data.toml"
    config.write_text(
        "[general]\ncaption_extension = '.txt'\n"
        "[[datasets]]\nresolution = 64\nbatch_size = 1\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder / 'train'}'\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder / 'keep'}'\n"
        "custom_attributes = { diff_output_preservation = true }\n"
        "[[datasets]]\nresolution = 64\nbatch_size = 1\nvalidation = true\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder / 'held'}'\n"
    )
    return config


@pytest.fixture(scope="module")
def output(nano, tmp_path_factory: pytest.TempPathFactory, python: WarmPython | ColdPython) -> Path:
    """A folder with the output of two processes, with a whole model and with a sharded one.

    Both trained twice: "all", and "late" where the first blocks have no LoRA and LoRAs are dropped at random.
    """
    folder = tmp_path_factory.mktemp("sharded")
    dataset = write_dataset(folder / "photos")
    (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --l 4 --d 1\n")
    rolled = ("--scheduled_sampling_max_step_offset=4", "--scheduled_sampling_probability=0.7")
    watched = (f"--sample_prompts={folder / 'prompts.txt'}", "--sample_every_n_epochs=1")
    more = {
        "all": (
            "--console_log_level=INFO",
            *watched,
            *rolled,
            "--gradient_checkpointing",
            "--tread_routes=1:-2:0.5",
        ),
        "late": (
            *("--console_log_level=INFO", "--mixed_precision=bf16"),
            "--network_args",
            "train_blocks=transformer",
            "module_dropout=0.5",
        ),
    }
    script = "lumina_train_network.py"
    jobs = [
        (sharded, [script, *legs.words(nano, dataset, folder / f"{name}-{sharded}", *flags)])
        for name, flags in more.items()
        for sharded in (False, True)
    ]
    (folder / "jobs").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    words = [*LAUNCHER.split(), "tests/reliability/sharding_worker.py", str(folder / "jobs")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder)}
    with (folder / "log").open("w") as log:
        processes = python.start(words, environment, log.fileno(), log.fileno())
    processes.join(200)
    processes.kill()
    told = (folder / "log").read_text()
    assert processes.exitcode == 0, told
    assert told.count("are spread over 2 processes by FSDP2") == 2, told
    return folder


@pytest.mark.parametrize("job", ["all", "late"])
def test_the_same_network(output: Path, job: str) -> None:
    whole, sharded = output / f"{job}-False", output / f"{job}-True"
    assert losses(whole) == losses(sharded)
    assert len(losses(whole)) == 4
    assert same(weights(whole), weights(sharded))


def test_processes_keep_step_that_walk_differently_far(output: Path) -> None:
    records = map(json.loads, (output / "all-True" / f"{NAME}.metrics.jsonl").read_text().splitlines())
    means = [record["rollout/mean_offset"] for record in records if record.get("rollout/pictures") == 2]
    assert any(mean % 1 for mean in means), "one walked farther than the other"


def test_the_same_validation(output: Path) -> None:
    def curve(folder: Path) -> list[dict[str, float]]:
        records = map(json.loads, (folder / f"{NAME}.metrics.jsonl").read_text().splitlines())
        curves = [{key: v for key, v in record.items() if "validation" in key} for record in records]
        return [values for values in curves if values]

    assert curve(output / "all-True") == curve(output / "all-False")
    assert len(curve(output / "all-True")) == 2


def test_the_same_pictures(output: Path) -> None:
    whole, sharded = (sorted((output / f"all-{kind}" / "sample").glob("*_e0*.png")) for kind in (False, True))
    assert len(whole) == len(sharded) == 2
    for one, other in zip(whole, sharded, strict=True):
        assert ImageChops.difference(Image.open(one), Image.open(other)).getbbox() is None


@pytest.mark.parametrize(
    ("flag", "why"), [("--blocks_to_swap=1", "--blocks_to_swap and FSDP"), ("--base_quant=int8", "quantised")]
)
def test_what_does_not_go_together_is_told_before_anything_is_encoded(
    nano, tmp_path: Path, flag: str, why: str
) -> None:
    context = Runs(nano, tmp_path, of_networks=True).context("lumina", flag)
    spread = replace(context, processes=SimpleNamespace(sharding=object()))
    with pytest.raises(ConfigError, match=why):
        TrainingRun(spread, StopSignals())
