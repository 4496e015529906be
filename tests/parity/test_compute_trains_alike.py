"""Training runs in every way of running blocks, from the command line's flags to the saved file."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.parity.runs import Run, write_config, write_photos

STEPS = 2
CHECKPOINTS = {"gradient_checkpointing": True}
MODES = {
    "plain": {"checkpoint_mode": "none"},
    "by default": {},
    "outputs": CHECKPOINTS,
    "full, every second block": CHECKPOINTS | {"checkpoint_mode": "full", "checkpoint_every_n_blocks": 2},
    "feed_forward, all swapped": CHECKPOINTS | {"checkpoint_mode": "feed_forward", "blocks_to_swap": 6},
    "outputs, all swapped": CHECKPOINTS | {"blocks_to_swap": 6},
}
COMPILED = {"torch_compile": True, "dynamo_backend": "aot_eager"}
WITHOUT_DROPOUT = {
    "no dropout": {},
    "products in 8 bits": {"base_quant": "int8", "quant_matmul": True},
    "compiled": COMPILED | CHECKPOINTS | {"blocks_to_swap": 3, "attn_mode": "torch"},
}


@pytest.fixture(scope="module")
def runs(train: Callable[..., Run], nano, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("compute")
    photos = write_photos(folder / "photos", ("cat", "rocket"))
    prompts = folder / "prompts.txt"
    prompts.write_text("a cat --w 32 --h 48 --s 2 --d 1 --l 2", encoding="utf-8")
    common = {
        "pretrained_model_name_or_path": nano.dit,
        "gemma2": nano.gemma2,
        "ae": nano.ae,
        "dataset_config": write_config(folder / "config.toml", photos),
        "network_module": "networks.lora_lumina",
        "learning_rate": 1e-2,
        "max_train_steps": STEPS,
        "seed": 3,
        "cache_latents": True,
        "cache_text_encoder_outputs": True,
        "sample_prompts": prompts,
        "sample_every_n_steps": 1,
    }
    half = common | {"mixed_precision": "bf16", "network_dropout": 0.2}
    found = {name: train(half | more) for name, more in MODES.items()}
    return found | {name: train(common | more) for name, more in WITHOUT_DROPOUT.items()}


@pytest.mark.parametrize("name", [name for name in MODES if name != "plain"])
def test_modes_change_no_bit(runs: dict[str, Run], name: str) -> None:
    plain, other = runs["plain"], runs[name]
    assert len(plain.losses) == STEPS and other.losses == plain.losses
    assert other.norms == plain.norms
    for key, tensor in plain.lora.items():
        assert torch.equal(tensor, other.lora[key]), key


def test_compiled_blocks_train_the_same(runs: dict[str, Run]) -> None:
    """With checkpoints and swapped blocks."""
    plain, compiled = runs["no dropout"], runs["compiled"]
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert compiled.norms == pytest.approx(plain.norms, rel=1e-3)
    assert len(list((compiled.folder / "sample").glob("*.png"))) == STEPS


def test_products_in_8_bits_train_nearly_the_same(runs: dict[str, Run]) -> None:
    plain, fast = runs["no dropout"], runs["products in 8 bits"]
    assert fast.losses != plain.losses
    assert fast.losses == pytest.approx(plain.losses, rel=0.01)
    assert fast.norms == pytest.approx(plain.norms, rel=0.05)
