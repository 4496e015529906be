"""What a run does beside training, and how its data comes to it, must not change what it learns.

Every run here has dropout in the network, mirrored pictures, masks, drawn and dropped captions, so there is
something random to be disturbed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.parity.independent_lumina import Lumina, draw
from tests.parity.runs import RECIPE, Run, add_alpha, pipeline_flags, recipe_flags, write_config, write_photos

STEPS, EARLY = 6, 3


@pytest.fixture(scope="module")
def runs(
    train: Callable[..., Run], pipeline: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("observers")
    photos = write_photos(folder / "photos")
    drawn = {"cat": "a {red|black|white} cat", "sky": "{dark|bright} sky, {galaxies|lights}"}
    for name, caption in drawn.items():
        (photos / f"{name}.txt").write_text(caption, encoding="utf-8")
    add_alpha(photos / "rocket.png")
    prompts = folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 3 --d 1\nrocket --w 48 --h 80 --s 3", encoding="utf-8")
    config = write_config(
        folder / "config.toml",
        photos,
        dataset="validation_split = 0.3\nvalidation_seed = 6\nnetwork_multiplier = 0.5",
        subset="flip_aug = true\nalpha_mask = true\nenable_wildcard = true\ncaption_dropout_rate = 0.3",
    )
    plain = (
        pipeline_flags(pipeline)
        | recipe_flags()
        | {
            "dataset_config": config,
            "network_args": ("rank_dropout=0.2", "module_dropout=0.2"),
            "network_dropout": 0.2,
            "max_train_steps": STEPS,
            "max_data_loader_n_workers": 0,
            "validate_every_n_epochs": 1000,
        }
    )
    events = {
        "sample_prompts": prompts,
        "sample_at_first": True,
        "sample_every_n_steps": 2,
        "sample_batch_size": 2,
        "validate_every_n_epochs": None,
        "validate_every_n_steps": 1,
        "save_every_n_steps": 1,
        "logging_dir": folder / "logs",
    }
    on_disk = {
        "cache_latents": None,
        "cache_latents_to_disk": True,
        "cache_text_encoder_outputs": None,
        "cache_text_encoder_outputs_to_disk": True,
        "cache_directory": folder / "cache",
    }
    uncached = {"cache_latents": None, "cache_text_encoder_outputs": None, "cache_dtype": None}
    workers = {"max_data_loader_n_workers": 4}
    changes = {
        "plain": {},
        "busy": events,
        "busy uncached": events | uncached | workers,
        "short": {"max_train_steps": EARLY},
        "four workers": workers,
        "checkpointing": {"gradient_checkpointing": True},
        "disk": on_disk,
        "disk again": on_disk | workers,
        "uncached": uncached,
    }
    return {name: train(plain | change) for name, change in changes.items()}


def assert_equal(one: Run, other: Run) -> None:
    assert one.losses == other.losses
    assert one.norms == other.norms
    for key, tensor in one.lora.items():
        assert torch.equal(tensor, other.lora[key]), key


def assert_close(one: Run, other: Run, tolerance: float) -> None:
    assert one.losses == pytest.approx(other.losses, rel=tolerance)
    for key, tensor in one.lora.items():
        assert (tensor - other.lora[key]).norm() <= 100 * tolerance * tensor.norm(), key


@pytest.mark.parametrize("name", ["busy", "four workers", "disk", "disk again"])
def test_bit_for_bit(runs: dict[str, Run], name: str) -> None:
    assert len(runs["plain"].losses) == STEPS
    assert_equal(runs["plain"], runs[name])


@pytest.mark.parametrize("name", ["checkpointing", "uncached"])
def test_close(runs: dict[str, Run], name: str) -> None:
    assert_close(runs["plain"], runs[name], 1e-5)


def test_events_change_nothing_when_encoders_stay_loaded(runs: dict[str, Run]) -> None:
    assert_equal(runs["uncached"], runs["busy uncached"])


def test_the_busy_run_was_busy(runs: dict[str, Run]) -> None:
    folder = runs["busy"].folder
    assert len(list((folder / "sample").glob("*.png"))) == 2 * (1 + STEPS // 2)
    assert len(list(folder.glob("last-step*.safetensors"))) == STEPS - 1
    validations = [line["loss/validation"] for line in runs["busy"].metrics if "loss/validation" in line]
    assert len(validations) == STEPS and len(set(validations)) == STEPS


def test_previews_show_the_network_of_their_step(runs: dict[str, Run], pipeline: Path) -> None:
    """At full strength, whatever the datasets' network_multiplier, without dropout, decoded once."""
    lumina = Lumina(pipeline)
    lora = Run(runs["busy"].folder, name="last-step00000004").lora
    for place, prompt, size, seed in ((0, "a cat", (64, 64), 1), (1, "rocket", (48, 80), RECIPE.seed + 1)):
        (path,) = (runs["busy"].folder / "sample").glob(f"last_000004_{place:02d}_*_{seed}.png")
        text = f"{RECIPE.system_prompt} <Prompt Start> {prompt}"
        expected = draw(lumina, text, "", lora, size=size, seed=seed, steps=3)
        found = np.asarray(Image.open(path))
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_shorter_run_is_the_beginning_of_a_longer_one(runs: dict[str, Run]) -> None:
    assert runs["short"].losses == runs["plain"].losses[:EARLY]
    between = Run(runs["busy"].folder, name=f"last-step{EARLY:08d}")
    for key, tensor in runs["short"].lora.items():
        assert torch.equal(tensor, between.lora[key]), key
