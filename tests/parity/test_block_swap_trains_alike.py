"""Training runs with and without block swap, with all that a run does beside training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.parity.runs import Run, write_config, write_photos

CHECKPOINTS = {"gradient_checkpointing": True, "cpu_offload_checkpointing": True}
SOME, ALL = {"blocks_to_swap": 3}, {"blocks_to_swap": 6, "block_swap_ring_size": 3}
RUNS = {
    "stay": {},
    "some swapped": SOME,
    "checkpoints": CHECKPOINTS,
    "all swapped, checkpoints": CHECKPOINTS | ALL,
}
STEPS = 2


@pytest.fixture(scope="module")
def runs(train: Callable[..., Run], nano, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("swap")
    photos = write_photos(folder / "photos", ("cat", "rocket", "sky", "man"))
    prompts = folder / "prompts.txt"
    prompts.write_text("a cat --w 32 --h 48 --s 2 --d 1 --l 2", encoding="utf-8")
    common = {
        "pretrained_model_name_or_path": nano.dit,
        "gemma2": nano.gemma2,
        "ae": nano.ae,
        "dataset_config": write_config(
            folder / "config.toml", photos, dataset="validation_split = 0.3\nvalidation_seed = 6"
        ),
        "network_module": "networks.lora_lumina",
        "learning_rate": 1e-2,
        "network_dropout": 0.2,
        "max_train_steps": STEPS,
        "mixed_precision": "bf16",
        "seed": 3,
        "cache_latents": True,
        "cache_text_encoder_outputs": True,
    }
    base = train(common)
    busy = common | {
        "base_weights": base.path,
        "base_weights_multiplier": 0.7,
        "ema": True,
        "ema_sample": "both",
        "sample_prompts": prompts,
        "sample_every_n_steps": 1,
        "validate_every_n_steps": 1,
        "network_args": ("embedder_dims=[2,2,2]", "train_blocks=all"),
    }
    return {name: train(busy | more) for name, more in RUNS.items()}


def pictures(run: Run) -> list[bytes]:
    paths = (run.folder / "sample").glob("last*.png")
    return [path.read_bytes() for path in sorted(paths, key=lambda path: without_time(path))]


def without_time(path: Path) -> list[str]:
    return [part for part in path.stem.split("_") if len(part) != 14]


@pytest.mark.parametrize("pair", [("stay", "some swapped"), ("checkpoints", "all swapped, checkpoints")])
def test_bit_for_bit(runs: dict[str, Run], pair: tuple[str, str]) -> None:
    stay, swapped = (runs[name] for name in pair)
    assert len(stay.losses) == STEPS and swapped.losses == stay.losses
    assert swapped.norms == stay.norms
    validations = [
        [line["loss/validation"] for line in run.metrics if "loss/validation" in line]
        for run in (stay, swapped)
    ]
    assert len(validations[0]) == STEPS and validations[0] == validations[1]
    assert len(pictures(stay)) == 2 * STEPS and pictures(swapped) == pictures(stay)
    for name in ("last", "last-ema"):
        averages = Run(swapped.folder, name=name).lora
        for key, tensor in Run(stay.folder, name=name).lora.items():
            assert torch.equal(tensor, averages[key]), key
