"""One training run from every layout of the same weights: which file they came from must not matter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.parity.runs import Run, write_config, write_photos
from tools.make_nano_models import LAYOUT_NAMES, make_nano_models

# Layouts by the epsilon of their query and key norms, which is all that they differ in.
ORIGINAL, DIFFUSERS = ("original", "comfyui", "all_in_one"), ("diffusers", "sharded")


@pytest.fixture(scope="module")
def runs(train: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("layouts")
    config = write_config(folder / "config.toml", write_photos(folder / "photos", ("cat", "rocket")))
    common = {
        "dataset_config": config,
        "network_module": "networks.lora_lumina",
        "learning_rate": 1e-2,
        "max_train_steps": 2,
        "timestep_sampling": "nextdit_shift",
        "seed": 3,
        "cache_latents": True,
        "cache_text_encoder_outputs": True,
        "cache_dtype": "fp32",
    }
    runs = {}
    for layout in LAYOUT_NAMES:
        paths = make_nano_models(folder / layout, layout=layout)
        models = {"pretrained_model_name_or_path": paths.dit, "gemma2": paths.gemma2, "ae": paths.ae}
        runs[layout] = train(common | models)
    return runs


def test_every_layout_is_compared() -> None:
    assert {*ORIGINAL, *DIFFUSERS} == set(LAYOUT_NAMES)


@pytest.mark.parametrize(("one", "other"), [(ORIGINAL[0], name) for name in ORIGINAL[1:]] + [DIFFUSERS])
def test_bit_for_bit(runs: dict[str, Run], one: str, other: str) -> None:
    assert runs[one].losses == runs[other].losses
    assert runs[one].norms == runs[other].norms
    for key, tensor in runs[one].lora.items():
        assert torch.equal(tensor, runs[other].lora[key]), key


def test_the_epsilon_of_diffusers_is_all_that_differs(runs: dict[str, Run]) -> None:
    assert runs["diffusers"].losses != runs["original"].losses
    assert runs["diffusers"].losses == pytest.approx(runs["original"].losses, rel=1e-4)
