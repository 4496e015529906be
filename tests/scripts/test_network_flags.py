"""The network's flags in real runs on nano models: what a file starts from, and what is done to it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def train(nano, run_script, tmp_path_factory):
    """Train on two photographs for three steps: `train(name, flags)` returns (result, LoRA)."""
    pictures = tmp_path_factory.mktemp("pictures") / "2_photos"
    pictures.mkdir()
    for name in ("cat.jpg", "cat.txt", "coffee.jpg", "coffee.txt"):
        (pictures / name).write_bytes((ROOT / "examples/photos" / name).read_bytes())
    folder = tmp_path_factory.mktemp("output")

    config = pictures.parent / "preserve.toml"
    config.write_text(
        "[[datasets]]\nresolution = 32\nvalidation_split = 0.4\n[[datasets.subsets]]\nnum_repeats = 2\n"
        f"image_dir = '{pictures}'\ncustom_attributes.diff_output_preservation = true\n"
    )

    def run(name, *flags, preserve=False):
        result = run_script(
            ROOT / "lumina_train_network.py",
            *(f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2={nano.gemma2}", f"--ae={nano.ae}"),
            *(f"--dataset_config={config}" if preserve else f"--train_data_dir={pictures.parent}",),
            *("--caption_extension=.txt", "--resolution=32"),
            *(f"--output_dir={folder}", f"--output_name={name}", "--network_module=networks.lora_lumina"),
            *("--max_train_steps=3", "--learning_rate=1e-2", "--mixed_precision=no", "--seed=3", *flags),
        )
        return result, folder / f"{name}.safetensors"

    return run


@pytest.fixture(scope="module")
def first(train):
    """A network with LoRAs of their own for q, k and v."""
    args = ("split_qkv=True", "rs_lora=True", "mod_dim=0", "block_dims=8,8,4,0", "network_reg_lrs=.*w1=1e-3")
    result, path = train("first", "--network_dim=4", "--network_alpha=4", "--network_args", *args)
    assert result.code == 0, result.err
    return path


def metrics(path):
    return [json.loads(line) for line in path.with_suffix(".metrics.jsonl").read_text().splitlines()]


def test_arguments_reach_the_file(first):
    state = load_file(first)
    assert state["lora_unet_layers_0_attention_qkv.lora_down.weight"].shape[0] == 24
    assert state["lora_unet_layers_2_attention_qkv.alpha"] == 3 * 4 * 2
    assert not any("layers_3" in key or "adaLN" in key for key in state)
    assert metrics(first)[0]["lr/lora_0.001"] == 1e-3


def test_a_run_starts_from_other_loras(train, first):
    limit = 0.02
    result, path = train(
        "second",
        *(f"--network_weights={first}", "--dim_from_weights", f"--scale_weight_norms={limit}"),
        *(f"--base_weights={first}", "--base_weights_multiplier=0.5", "--network_args", "split_qkv=True"),
    )
    assert result.code == 0, result.err
    assert "merged" in result.err + result.out
    before, after = load_file(first), load_file(path)
    assert before.keys() == after.keys()
    assert all(before[key] == after[key] for key in before if key.endswith(".alpha"))
    with safe_open(path, "pt") as file:
        recorded = file.metadata()
    assert recorded["ss_network_dim"] == "4" and float(recorded["ss_scale_weight_norms"]) == limit
    assert json.loads(recorded["ss_base_weights"]) == ["first.safetensors"]
    assert norms(after).max() <= limit * 1.0001
    last = metrics(path)[-1]
    assert last["max_norm/keys_scaled"] > 0
    assert last["max_norm/max_key_norm"] == pytest.approx(norms(after).max().item(), rel=1e-4)
    assert last["max_norm/average_key_norm"] == pytest.approx(norms(after).mean().item(), rel=1e-4)


def norms(state):
    found = []
    for key in state:
        if key.endswith(".alpha"):
            down, up = (state[key.replace("alpha", f"lora_{part}.weight")] for part in ("down", "up"))
            found.append((state[key] / len(down) * (up @ down)).norm())
    return torch.stack(found)


def test_mistakes_are_answered_before_training(train, first):
    result, _ = train("third", "--dim_from_weights")
    assert result.code == 2 and "--dim_from_weights needs --network_weights" in result.err
    result, _ = train("third", "--network_args", "exclude_patterns=attention")
    assert result.code == 2 and "'attention' matches no layer" in result.err and "encod" not in result.err
    result, _ = train("third", "--base_weights=nowhere.safetensors")
    assert result.code != 0 and "nowhere.safetensors" in result.err and "Traceback" not in result.err


@pytest.fixture(scope="module")
def both(train, tmp_path_factory):
    """A run that trains the text encoder too, with checkpointing and a preview."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a cat --w 32 --h 32 --s 2 --d 0\n")
    result, path = train(
        "both",
        *("--network_train_text_encoder", "--text_encoder_lr=1e-2", "--gradient_checkpointing"),
        *(f"--sample_prompts={prompts}", "--sample_every_n_steps=1"),
    )
    assert result.code == 0, result.err
    return path


def test_the_text_encoder_learns_and_previews_see_it(both, first):
    state = load_file(both)
    ups = [tensor for key, tensor in state.items() if "lora_te_" in key and key.endswith("lora_up.weight")]
    assert ups and all(up.any() for up in ups)
    assert any(key.startswith("lora_unet_") for key in state)
    assert "lr/text_encoder_0.01" in metrics(both)[0] and "lr/lora" in metrics(both)[0]
    pictures = sorted((both.parent / "sample").glob("both_*.png"))
    assert len(pictures) == 3 and len({picture.read_bytes() for picture in pictures}) == 3


def test_inference_applies_the_text_encoders_part(both, nano, run_script, tmp_path):
    only_text = tmp_path / "text.safetensors"
    save_file({k: v for k, v in load_file(both).items() if k.startswith("lora_te_")}, only_text)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a cat --m {m} --d 1 --w 32 --h 32 --s 2\n" for m in (0, 1, 0, 1)))

    def draw(*flags):
        folder = tmp_path / f"pictures{len(list(tmp_path.iterdir()))}"
        result = run_script(
            ROOT / "lumina_minimal_inference.py",
            *(f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2_path={nano.gemma2}"),
            *(f"--ae_path={nano.ae}", f"--lora_weights={only_text}", f"--output_dir={folder}"),
            *("--dtype=fp32", "--gemma2_dtype=fp32", "--ae_dtype=fp32", "--device=cpu", *flags),
        )
        assert result.code == 0, result.err
        return [np.asarray(Image.open(line)).astype(int) for line in result.out.split()]

    off, on, off_again, on_again = draw(f"--from_file={prompts}")
    assert (off == off_again).all() and (on == on_again).all() and (on != off).any()
    one = ("--prompt=a cat", "--seed=1", "--image_width=32", "--image_height=32", "--steps=2")
    (merged,) = draw(*one, "--merge_lora_weights")
    assert abs(merged - on).max() <= 1 < abs(on - off).max()


def test_what_is_preserved_is_what_the_untrained_text_encoder_leads_to(both, train, tmp_path):
    """With a LoRA on the text encoder alone, its words must be those without the LoRA for the target."""
    only_text = tmp_path / "text.safetensors"
    save_file({k: v for k, v in load_file(both).items() if k.startswith("lora_te_")}, only_text)
    result, path = train(
        "preserved",
        *("--network_train_text_encoder_only", f"--network_weights={only_text}"),
        preserve=True,
    )
    assert result.code == 0, result.err
    assert not any(key.startswith("lora_unet_") for key in load_file(path))
    assert metrics(path)[0]["loss/current"] > 0
    assert any("loss/validation" in record for record in metrics(path))
    _, path = train("new", "--network_train_text_encoder_only", preserve=True)
    assert metrics(path)[0]["loss/current"] == 0  # a new LoRA has no effect yet


def test_cached_texts_and_a_trained_text_encoder_exclude_each_other(train):
    result, _ = train("never", "--cache_text_encoder_outputs", "--text_encoder_lr=1e-4")
    assert result.code == 2 and "would learn nothing" in result.err


def test_doras_and_start_weights_in_real_runs(train):
    result, path = train("dora", "--network_args", "dora_wd=True", "init=pissa_niter_2", "attn_dim=2")
    assert result.code == 0, result.err
    state = load_file(path)
    name = "lora_unet_layers_0_attention_qkv"
    assert state[f"{name}.lora_down.weight"].shape[0] == 4
    assert state[f"{name}.dora_scale"].shape == (1, state[f"{name}.lora_down.weight"].shape[1])
    first = metrics(path)[0]
    assert "lr/lora_magnitude" in first and not any("start" in key for key in first)
    result, again = train(
        "dora2", f"--network_weights={path}", "--dim_from_weights", "--full_bf16", "--mixed_precision=bf16"
    )
    assert result.code == 0, result.err
    assert load_file(again).keys() == state.keys()


def test_a_run_with_start_weights_goes_on_from_its_state(train):
    flags = ("--network_args", "init=pissa", "split_qkv=True", "dora_wd=True")
    result, path = train("part", *flags, "--save_state", "--save_every_n_steps=2")
    assert result.code == 0, result.err
    whole = load_file(path)
    result, path = train("part", *flags, f"--resume={next(path.parent.glob('part-step*-state'))}")
    assert result.code == 0, result.err
    resumed = load_file(path)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_base_weights_change_the_text_encoder_and_its_cache(both, train, tmp_path):
    only_text = tmp_path / "text.safetensors"
    save_file({k: v for k, v in load_file(both).items() if k.startswith("lora_te_")}, only_text)
    cached = ("--cache_text_encoder_outputs_to_disk", f"--cache_directory={tmp_path / 'cache'}")
    base = (f"--base_weights={only_text}",)
    losses = []
    for name, flags in (("plain", cached), ("stale", (*cached, *base)), ("online", base)):
        result, path = train(name, *flags, "--max_train_steps=1")
        assert result.code == 0, result.err
        losses.append(metrics(path)[0]["loss/current"])
    without, from_cache, online = losses
    assert abs(from_cache - without) > 10 * abs(from_cache - online)
