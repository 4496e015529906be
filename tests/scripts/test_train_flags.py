"""Small flags of the training script, each seen by its effect on a run."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def train(nano, run_script, tmp_path_factory):
    """Train two steps with more flags in a folder of its own; return the folder and what was printed."""
    photos = tmp_path_factory.mktemp("data") / "1_cat"
    photos.mkdir()
    with Image.open(ROOT / "examples/photos/cat.jpg") as photo:
        photo.resize((64, 64)).save(photos / "cat.png")
    (photos / "cat.txt").write_text("a cat")
    words = [
        *(f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2={nano.gemma2}", f"--ae={nano.ae}"),
        *(f"--train_data_dir={photos.parent}", "--resolution=64", "--network_module=networks.lora_lumina"),
        *("--network_dim=4", "--max_train_steps=2", "--learning_rate=1e-2", "--seed=3"),
        *("--caption_extention=.txt", "--max_data_loader_n_workers=1"),
    ]

    def run(*more):
        folder = tmp_path_factory.mktemp("out")
        more = [word.replace("OUT", str(folder)) for word in more]
        result = run_script("lumina_train_network.py", *words, f"--output_dir={folder}", *more)
        assert result.code == 0, result.err
        return folder, result

    return run


@pytest.fixture(scope="module")
def plain(train):
    return train()


def lora(folder):
    return load_file(folder / "last.safetensors")


def losses(folder):
    lines = map(json.loads, (folder / "last.metrics.jsonl").read_text().splitlines())
    return [line["loss/current"] for line in lines if "loss/current" in line]


def test_flags_that_change_only_how_it_is_done_change_no_bit(train, plain):
    folder, _ = train(
        *("--gradient_checkpointing", "--cpu_offload_checkpointing", "--disable_mmap_load_safetensors"),
        *("--sdpa", "--lowram", "--highvram", "--persistent_data_loader_workers", "--cache_info"),
        *("--cache_latents_to_disk", "--cache_directory=OUT/cache", "--cache_dtype=fp32"),
        *("--skip_cache_check", "--max_timestep=1000", "--noise_offset=0", "--ip_noise_gamma=0"),
    )
    wanted, found = lora(plain[0]), lora(folder)
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_full_bf16_trains_weights_that_are_bf16(train):
    folder, _ = train("--full_bf16", "--mixed_precision=bf16")
    weights = {key: value for key, value in lora(folder).items() if not key.endswith("alpha")}
    assert all(torch.equal(value, value.bfloat16().float()) for value in weights.values())
    assert all(value.any() for key, value in weights.items() if key.endswith("lora_up.weight"))


def test_perturbed_input_changes_the_loss_and_not_the_target(train, plain):
    folder, _ = train("--ip_noise_gamma=1.0")
    assert losses(folder)[0] != losses(plain[0])[0]
    assert losses(folder)[0] == pytest.approx(losses(plain[0])[0], rel=0.5)


def test_messages_and_configuration_go_where_they_are_asked_to(train, plain, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 3\na cat --w 64 --h 64 --s 3 --ss dpmsolver++\n")
    folder, result = train(
        *("--console_log_file=OUT/logs/run.log", "--console_log_simple", "--log_config"),
        *("--logging_dir=OUT/board", "--sample_sampler=heun", f"--sample_prompts={prompts}"),
        "--sample_at_first",
    )
    lines = (folder / "logs" / "run.log").read_text().splitlines()
    assert any(line.startswith("trained 2 steps; saved") for line in lines)
    assert "trained 2 steps" in plain[1].err and "trained 2 steps" not in result.err
    (board,) = (folder / "board").glob("*/network_train")
    events = EventAccumulator(str(board)).Reload()
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert 'sample_sampler = "heun"' in text and "seed = 3" in text
    pictures = sorted((folder / "sample").glob("*.png"))
    samplers = [Image.open(picture).info["parameters"].split("Sampler: ")[1] for picture in pictures]
    assert [sampler.split(",")[0] for sampler in samplers] == ["Heun", "DPM++ 2M"]
