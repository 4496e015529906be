"""Runs of the Lumina trainer on nano models, whole or in legs, and what is compared between them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from library.options.group import parse_options
from library.options.train import LuminaTrainOptions
from lumina_train_network import LuminaTrainer

NAME = "kiwi"  # every run's --output_name


def write_dataset(folder: Path, pictures: int = 5, batch_size: int = 2) -> Path:
    """Write a small dataset and its configuration; return the configuration's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(pictures):
        Image.new("RGB", (64, 64), (40 * number, 90, 200 - 30 * number)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}, flat, calm, small")
    config = folder / "data.toml"
    config.write_text(
        "[general]\ncaption_extension = '.txt'\nflip_aug = true\nshuffle_caption = true\n"
        "caption_dropout_rate = 0.2\n"
        f"[[datasets]]\nresolution = 64\nbatch_size = {batch_size}\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder}'\n"
    )
    return config


def words(nano, config: Path, output: Path, *more: str) -> list[str]:
    """Return the command line of a run with dropout, so that every kind of randomness has a part in it."""
    return [
        *(f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2={nano.gemma2}", f"--ae={nano.ae}"),
        *(f"--dataset_config={config}", f"--output_dir={output}", f"--output_name={NAME}"),
        *("--network_module=networks.lora_lumina", "--network_dim=2", "--network_dropout=0.1"),
        *("--network_args", "train_blocks=refiners"),
        *("--learning_rate=1e-2", "--lr_scheduler=cosine", "--seed=7", "--max_train_epochs=2"),
        *("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"),
        *("--max_data_loader_n_workers=0", "--console_log_level=WARNING", *more),
    ]


def train(command: list[str]) -> Path:
    """Train in this process; return the saved network's path."""
    torch.set_num_threads(1)
    return LuminaTrainer(parse_options(LuminaTrainOptions, command)).train()


def weights(output: Path, suffix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a network file."""
    return load_file(output / f"{NAME}{suffix}.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two networks are the same bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def losses(output: Path) -> dict[int, tuple[float, ...]]:
    """Return loss and averages by step as logged; a step that was trained twice must be twice the same."""
    logged: dict[int, tuple[float, ...]] = {}
    for line in (output / f"{NAME}.metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss/current" in record:
            values = tuple(record[k] for k in ("loss/current", "loss/average", "loss/smoothed", "grad_norm"))
            assert logged.setdefault(record["step"], values) == values
    return logged


def states(output: Path) -> list[str]:
    """Return the names of the state folders, sorted, without the output name."""
    return sorted(p.name.removeprefix(NAME) for p in output.iterdir() if p.is_dir() and "-state" in p.name)
