"""Training with other optimizers than AdamW, as a user types it: what is saved, logged and refused."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def train(nano, run_script, tmp_path_factory):
    """Train four steps on two small pictures; returns the result and the output folder."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} square")
    config = folder / "config.toml"
    config.write_text(
        f"[[datasets]]\nresolution = 32\ncaption_extension = '.txt'\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder}'\n"
    )

    def run(*arguments):
        output = tmp_path_factory.mktemp("output")
        result = run_script(
            ROOT / "lumina_train_network.py",
            *(f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2={nano.gemma2}", f"--ae={nano.ae}"),
            *(f"--dataset_config={config}", f"--output_dir={output}", "--output_name=lora", "--seed=1"),
            *("--network_module=networks.lora_lumina", "--network_dim=2", "--network_alpha=2"),
            *("--cache_latents", "--cache_text_encoder_outputs", "--max_train_steps=4", *arguments),
        )
        return result, output

    return run


def metrics(folder):
    lines = (folder / "lora.metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss/current" in record]


def test_schedule_free_saves_its_average_and_resumes_from_what_it_trains(train):
    words = ("--optimizer_type=AdamWScheduleFree", "--learning_rate=1e-2")
    whole, first = train(*words, "--save_every_n_steps=2", "--save_state")
    assert whole.code == 0, whole.err
    state = first / "lora-step00000002-state"
    resumed, second = train(*words, f"--resume={state}")
    assert resumed.code == 0, resumed.err
    average, again = (load_file(folder / "lora.safetensors") for folder in (first, second))
    assert average.keys() == again.keys()
    assert all(torch.equal(average[key], again[key]) for key in average)
    trained, saved = (
        load_file(state / "network.safetensors"),
        load_file(first / "lora-step00000002.safetensors"),
    )
    layer = "lora_unet_layers_0_attention_qkv"
    assert not torch.equal(trained[f"loras.{layer}.up"], saved[f"{layer}.lora_up.weight"])


def test_prodigy_logs_what_it_found_with_a_scheduler_class(train):
    result, folder = train(
        *("--optimizer_type=prodigy", "--learning_rate=1", "--optimizer_args", "decouple=True", "d_coef=2"),
        *("--lr_scheduler_type=StepLR", "--lr_scheduler_args", "step_size=2", "gamma=0.5"),
    )
    assert result.code == 0, result.err
    records = metrics(folder)
    assert [record["lr/lora"] for record in records] == [1, 1, 0.5, 0.5]
    assert records[-1]["lr/d*lr/lora"] > 0
    with safe_open(folder / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_optimizer"] == "prodigyopt.prodigy.Prodigy(decouple=True,d_coef=2)"


def test_adafactor_of_the_old_guides(train):
    result, folder = train(
        *("--optimizer_type=Adafactor", "--learning_rate=1e-4", "--lr_scheduler=adafactor"),
        *("--optimizer_args", "relative_step=True", "scale_parameter=True", "warmup_init=True"),
    )
    assert result.code == 0, result.err
    assert "--learning_rate has no part in it" in result.err
    rates = [record["lr/lora"] for record in metrics(folder)]
    assert rates == sorted(rates)
    assert 0 < rates[0] < rates[-1] < 1e-5
