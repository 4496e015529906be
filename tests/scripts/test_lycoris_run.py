"""`--network_module lycoris.kohya` from the command line: a run, the same run resumed, pictures with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import lumina_minimal_inference

ROOT = Path(__file__).resolve().parents[2]
ARGS = (
    *("algo=lokr", "factor=4", "preset=full", "conv_dim=4", "conv_alpha=1", "rank_dropout=0.1"),
    *("module_dropout=0.1", "dora_wd=True"),
)


@pytest.fixture(scope="module")
def train(nano, run_script, tmp_path_factory):
    """Train on two photographs, as users of sd-scripts write it: `train(name, *flags)` -> (result, file)."""
    pictures = tmp_path_factory.mktemp("pictures") / "2_photos"
    pictures.mkdir()
    for name in ("cat.jpg", "cat.txt", "coffee.jpg", "coffee.txt"):
        (pictures / name).write_bytes((ROOT / "examples/photos" / name).read_bytes())
    folder = tmp_path_factory.mktemp("output")

    def run(name, *flags):
        result = run_script(
            ROOT / "lumina_train_network.py",
            *(f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2={nano.gemma2}", f"--ae={nano.ae}"),
            *(f"--train_data_dir={pictures.parent}", "--caption_extension=.txt", "--resolution=32"),
            *(f"--output_dir={folder}", f"--output_name={name}", "--network_module=lycoris.kohya"),
            *("--network_dim=4", "--network_alpha=2", "--network_args", *ARGS),
            *("--max_train_steps=4", "--learning_rate=1e-2", "--mixed_precision=bf16", "--seed=3", *flags),
        )
        return result, folder / f"{name}.safetensors"

    return run


@pytest.fixture(scope="module")
def first(train):
    result, path = train(
        "first",
        *("--save_every_n_steps=2", "--save_state", "--ema", "--scale_weight_norms=0.5"),
        *("--network_train_text_encoder", "--gradient_checkpointing"),
    )
    assert result.code == 0, result.err
    assert "LyCORIS: lokr on" in result.err
    assert "conv_dim has no effect: the model has no convolutions" in result.err
    return path


def test_what_was_trained_is_in_the_file(first):
    state = load_file(first)
    ends = {key.partition(".")[2] for key in state}
    assert (
        {"lokr_w1", "alpha", "dora_scale"}
        <= ends
        <= {
            *("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha", "dora_scale"),
        }
    )
    assert any(key.startswith("lora_te_layers_0_") for key in state)
    moved = [tensor for key, tensor in state.items() if key.endswith((".lokr_w2", ".lokr_w2_b"))]
    assert moved and all(tensor.any() for tensor in moved)
    with safe_open(first, "pt") as file:
        recorded = file.metadata()
    assert recorded["ss_network_module"] == "lycoris.kohya"
    assert json.loads(recorded["ss_network_args"])["algo"] == "lokr"
    lines = [json.loads(line) for line in first.with_suffix(".metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["max_norm/max_key_norm"] <= 0.5001
    average = load_file(first.with_name("first-ema.safetensors"))
    assert average.keys() == state.keys() and any((average[key] != state[key]).any() for key in state)


def test_a_resumed_run_ends_with_the_same_bits(train, first):
    (state,) = first.parent.glob("first-step00000002-state")
    result, path = train(
        "second",
        *(f"--resume={state}", "--ema", "--scale_weight_norms=0.5", "--network_train_text_encoder"),
        "--gradient_checkpointing",
    )
    assert result.code == 0, result.err
    for suffix in ("", "-ema"):
        one = load_file(first.with_name(f"first{suffix}.safetensors"))
        other = load_file(path.with_name(f"second{suffix}.safetensors"))
        assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)


def test_pictures_with_it_applied_and_merged(nano, first, tmp_path, monkeypatch):
    def draw(*flags):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        words = [
            *(f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2_path={nano.gemma2}"),
            *(f"--ae_path={nano.ae}", "--dtype=fp32", "--gemma2_dtype=fp32", "--ae_dtype=fp32"),
            *("--image_width=32", "--image_height=32", "--steps=2", "--device=cpu", "--seed=1"),
            *("--prompt=a cat", f"--output_dir={folder}", *flags),
        ]
        monkeypatch.setattr(sys, "argv", ["script", *words])
        lumina_minimal_inference.main()
        (picture,) = folder.glob("*.png")
        return np.asarray(Image.open(picture)).astype(int)

    applied = draw("--lora_weights", f"{first};1.0")
    merged = draw("--lora_weights", f"{first};1.0", "--merge_lora_weights")
    without = draw()
    assert abs(applied - merged).max() <= 2 < abs(applied - without).max()


def test_mistakes_are_told_before_training(train):
    result, _ = train("third", "--network_args", "algo=dylora")
    assert result.code == 2 and "dylora is not made here" in result.err and "Traceback" not in result.err
