"""What a run shows and keeps while it trains: averages, sample pictures side by side, numbers, files."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
STEPS, DECAY = 5, 0.9


@pytest.fixture(scope="module")
def base_arguments(nano, tmp_path_factory):
    """Three photographs one by one, four steps."""
    photos = tmp_path_factory.mktemp("photos")
    for name in ("cat.jpg", "grass.jpg", "rocket.jpg"):
        (photos / name).write_bytes((ROOT / "examples/photos" / name).read_bytes())
        (photos / name).with_suffix(".txt").write_text(f"a {name[:-4]}")
    config = photos / "dataset.toml"
    config.write_text(
        "[general]\ncaption_extension = '.txt'\n[[datasets]]\nresolution = 64\nbatch_size = 1\n"
        f"[[datasets.subsets]]\nimage_dir = '{photos}'\n"
    )
    return [
        *(f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2={nano.gemma2}", f"--ae={nano.ae}"),
        *(f"--dataset_config={config}", "--network_module=networks.lora_lumina", "--network_dim=4"),
        *("--learning_rate=1e-2", "--lr_scheduler=constant", f"--max_train_steps={STEPS}", "--seed=3"),
        *("--cache_latents", "--cache_text_encoder_outputs", "--max_data_loader_n_workers=0"),
    ]


@pytest.fixture(scope="module")
def watched(base_arguments, run_script, tmp_path_factory):
    """The folder of a run with everything on."""
    folder = tmp_path_factory.mktemp("watched")
    prompts = folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 0\na rocket --w 64 --h 48 --s 2 --d 0\n")
    result = run_script(
        ROOT / "lumina_train_network.py",
        *base_arguments,
        *(f"--output_dir={folder}", "--output_name=lora", f"--logging_dir={folder / 'logs'}"),
        *("--ema", f"--ema_decay={DECAY}", "--ema_sample=both", "--sample_compare_base"),
        *(f"--sample_prompts={prompts}", "--sample_every_n_steps=2", "--save_every_n_steps=1"),
    )
    assert result.code == 0, result.err
    return folder


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "lora.metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/current" in line]


def test_the_average_is_saved_beside_every_network_and_is_what_it_says(watched):
    """Computed again from the networks of the single steps; `up` starts at zero, so its start is known."""
    raw = [load_file(watched / f"lora-step{step:08d}.safetensors") for step in range(1, STEPS)]
    raw.append(load_file(watched / "lora.safetensors"))
    for key in (key for key in raw[0] if key.endswith("lora_up.weight")):
        average = torch.zeros_like(raw[0][key])
        for step, network in enumerate(raw, start=1):
            keep = min(DECAY, (1 + step) / (10 + step))
            average = keep * average + (1 - keep) * network[key]
            if step == 3:
                saved = load_file(watched / "lora-step00000003-ema.safetensors")[key]
                torch.testing.assert_close(saved, average)
        torch.testing.assert_close(load_file(watched / "lora-ema.safetensors")[key], average)
    with safe_open(watched / "lora-ema.safetensors", "pt") as file:
        assert file.metadata()["ss_weights"] == "running average (EMA)"
        assert file.metadata()["ss_ema_decay"] == str(DECAY)


def test_sample_pictures_of_base_network_and_average(watched):
    names = ["_".join(p.stem.split("_")[:3]) for p in sorted((watched / "sample").glob("*.png"))]
    whens = [f"{name}_{step:06d}_{n:02d}" for name in ("lora-ema", "lora") for step in (2, 4) for n in (0, 1)]
    assert sorted(names) == sorted(["lora-base_000002_00", "lora-base_000002_01", *whens])
    first = {
        name: next((watched / "sample").glob(f"{name}_000002_00_*")).read_bytes()
        for name in ("lora-base", "lora-ema", "lora")
    }
    assert len(set(first.values())) == 3
    with Image.open(watched / "lora.samples.png") as grid:
        assert grid.width > 5 * 256 and grid.height > 2 * 256


def test_tensorboard_shows_the_pictures(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (log,) = (watched / "logs").glob("*/network_train")
    events = EventAccumulator(str(log)).Reload()
    assert [image.step for image in events.Images("sample/01")] == [2, 4]
    assert [image.step for image in events.Images("sample-base/01")] == [2]
    assert (events.Images("sample/01")[0].width, events.Images("sample/01")[0].height) == (64, 48)


def test_numbers_of_each_step(watched):
    found = metrics(watched)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for line in found:
        (band,) = (value for name, value in line.items() if name.startswith("loss/sigma_"))
        assert band == pytest.approx(line["loss/current"])  # a step is one picture
        assert line["speed/images_per_second"] > 0 and line["speed/data_wait_seconds"] >= 0
        assert line["memory/peak_gib"] > 0.1
    losses = [line["loss/current"] for line in found]
    # Numbers are read once a step, before the update; those of the weights, in the first step and every 10th.
    assert found[0]["norm/up"] == 0 < found[0]["norm/down"]
    assert all("norm/up" not in line for line in found[1:])
    assert found[2]["loss/epoch_average"] == pytest.approx(sum(losses[:3]) / 3)


def test_old_files_are_removed_and_all_else_is_as_it_was(watched, base_arguments, run_script, tmp_path):
    """Also: a pickle holds the same weights, and neither average nor pictures changed the network."""
    (tmp_path / "lora-step00000000.ckpt").write_text("of an earlier run")
    result = run_script(
        ROOT / "lumina_train_network.py",
        *base_arguments,
        *(f"--output_dir={tmp_path}", "--output_name=lora", "--save_every_n_steps=1"),
        *("--save_every_n_epochs=1", "--save_last_n_steps=1", "--save_model_as=ckpt"),
    )
    assert result.code == 0, result.err
    kept = ["-000001", "-step00000000", "-step00000003", "-step00000004", ""]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [f"lora{name}.ckpt" for name in kept]
    network = load_file(watched / "lora.safetensors")
    pickled = torch.load(tmp_path / "lora.ckpt", weights_only=True)
    assert pickled.keys() == network.keys()
    assert all(torch.equal(pickled[key], network[key]) for key in network)
