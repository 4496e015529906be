"""A run on nano models, put together as `TrainingRun` does it, whose parts a test can ask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from library.options.group import parse_options
from library.options.train import LuminaTrainOptions
from library.training.assembly import Assembly, assemble
from library.training.context import RunContext
from library.training.prepare import prepare
from library.training.run import TrainingRun
from library.training.state.stop import StopRequest, StopSignals
from lumina_train_network import LuminaTrainer

SIZES = ((64, 64), (96, 64), (32, 48), (64, 32), (32, 32), (48, 80))


def write_pictures(folder: Path, sizes: Sequence[tuple[int, int]] = SIZES) -> Path:
    """Write a picture of each size, some with an alpha channel, and return the dataset's configuration."""
    folder.mkdir()
    for number, size in enumerate(sizes):
        picture = Image.new("RGBA", size, (40 * number % 256, 90, 200 - 30 * number % 256, 255))
        picture.paste((255, 255, 0, 60), (0, 0, 16, 16))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("calm, " * (number + 1) + "a picture")
    config = folder.with_suffix(".toml")
    config.write_text(
        "[general]\ncaption_extension = '.txt'\nenable_bucket = true\nbucket_reso_steps = 16\n"
        "min_bucket_reso = 32\nbucket_no_upscale = true\n"
        f"[[datasets]]\nresolution = 96\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"
        "alpha_mask = true\n"
    )
    return config


def command(nano: object, config: Path, output: Path, *more: str) -> list[str]:
    """Return a command line that trains four steps."""
    return [
        *(f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2={nano.gemma2}", f"--ae={nano.ae}"),
        *(f"--dataset_config={config}", f"--output_dir={output}", "--output_name=run", "--seed=3"),
        *("--network_module=networks.lora_lumina", "--network_dim=2", "--learning_rate=1e-2"),
        *("--cache_latents", "--cache_text_encoder_outputs", "--max_train_steps=4", "--masked_loss"),
        *("--console_log_level=WARNING", "--max_data_loader_n_workers=1", *more),
    ]


def put_together(
    words: Sequence[str], trainer: type[LuminaTrainer] = LuminaTrainer
) -> tuple[RunContext, Assembly]:
    """Return a run's context and its parts; the caches are filled and the model is loaded."""
    torch.set_num_threads(1)
    context = context_of(words, trainer)
    context.inputs.fill_caches(context.prepared.manifest)
    return context, assemble(context, StopRequest(StopSignals(), Path("no such file"), None))


def started(words: Sequence[str], trainer: type[LuminaTrainer] = LuminaTrainer) -> TrainingRun:
    """Return a run that only has to be run."""
    torch.set_num_threads(1)
    return TrainingRun(context_of(words, trainer), StopSignals())


def context_of(words: Sequence[str], trainer: type[LuminaTrainer] = LuminaTrainer) -> RunContext:
    """Decide a run."""
    made = trainer(parse_options(LuminaTrainOptions, list(words)))
    return RunContext.decide(made, prepare(made))
