"""Small pictures to train on, and training runs in other processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.parity.independent import Recipe

# Name: size, and a caption. Buckets are 64 x 64, 80 x 48 and 48 x 80.
PHOTOS = {
    "cat": ((64, 64), "a small cat"),
    "dog": ((128, 128), "a large dog on a wooden table, looking at a coffee cup; dark city lights behind it"),
    "rocket": ((64, 64), "rocket"),
    "sky": ((80, 48), "a distant galaxy in the bright sky"),
    "woman": ((48, 80), "portrait of a smiling woman in an orange suit"),
    "man": ((80, 48), "a man with a camera"),  # lies on its side
}
SIDEWAYS = "man"


# What test_training_against_diffusers.py trains, and test_inference_against_diffusers.py draws with.
STEPS, ACCUMULATION = 5, 3
RECIPE = Recipe(
    seed=7,
    system_prompt="You are an assistant designed to generate high-quality images.",
    alpha=2.0,
    rates=(0.01, 0.04),
    betas=(0.8, 0.95),
    eps=1e-5,
    weight_decay=0.1,
    max_norm=0.4,
)


@dataclass(frozen=True)
class Run:
    """What a training run left behind."""

    folder: Path
    log: str = ""
    name: str = "last"

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        text = (self.folder / f"{self.name}.metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    @property
    def losses(self) -> list[float]:
        return [line["loss/current"] for line in self.metrics if "loss/current" in line]

    @property
    def norms(self) -> list[float]:
        return [line["grad_norm"] for line in self.metrics if "grad_norm" in line]

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @cached_property
    def lora(self) -> dict[str, Tensor]:
        return load_file(self.path)


def environment(cache: Path) -> dict[str, str]:
    """Variables of a training process: no GPU, one thread, no network, a cache folder of its own."""
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "XDG_CACHE_HOME": str(cache),
    }


def write_photos(folder: Path, names: Iterable[str] = tuple(PHOTOS)) -> Path:
    """Write some of PHOTOS."""
    return write_pictures(folder, {name: PHOTOS[name] for name in names})


def write_pictures(folder: Path, pictures: Mapping[str, tuple[tuple[int, int], str]], seed: int = 5) -> Path:
    """Write smooth, noisy pictures and their captions."""
    folder.mkdir()
    source = np.random.default_rng(seed)
    for name, ((width, height), caption) in pictures.items():
        corners = Image.fromarray(source.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        smooth = np.asarray(corners.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + source.integers(-30, 31, smooth.shape)
        exif = Image.Exif()
        if name == SIDEWAYS:
            exif[0x0112] = 6
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png", exif=exif)
        (folder / f"{name}.txt").write_text(caption + "\nnot this line\n", encoding="utf-8")
    return folder


def add_alpha(path: Path) -> None:
    """Give a picture an alpha channel that falls from top to bottom."""
    with Image.open(path) as picture:
        width, height = picture.size
        ramp = np.linspace(255, 0, width * height).astype(np.uint8).reshape(height, width)
        picture.putalpha(Image.fromarray(ramp))
        picture.save(path)


def write_config(
    path: Path,
    photos: Path,
    *,
    resolution: int = 64,
    batch_size: int = 2,
    dataset: str = "",
    subset: str = "",
) -> Path:
    """Write a dataset configuration; `dataset` and `subset` are more lines of it."""
    path.write_text(
        f"[general]\ncaption_extension = '.txt'\nenable_bucket = true\nbucket_reso_steps = 16\n"
        f"min_bucket_reso = 32\n"
        f"[[datasets]]\nresolution = {resolution}\nbatch_size = {batch_size}\n{dataset}\n"
        f"[[datasets.subsets]]\nimage_dir = '{photos}'\n{subset}\n",
        encoding="utf-8",
    )
    return path


def pipeline_flags(folder: Path) -> dict[str, object]:
    """The flags that name the models of a pipeline folder, in training."""
    return {
        "pretrained_model_name_or_path": folder / "transformer",
        "gemma2": folder / "text_encoder",
        "ae": folder / "vae",
    }


def inference_flags(folder: Path) -> dict[str, object]:
    """The flags that name the models of a pipeline folder, in inference, all in fp32."""
    models = {
        "pretrained_model_name_or_path": folder / "transformer",
        "gemma2_path": folder / "text_encoder",
        "ae_path": folder / "vae",
    }
    return models | dict.fromkeys(("dtype", "gemma2_dtype", "ae_dtype"), "fp32")


def recipe_flags() -> dict[str, object]:
    """RECIPE as flags, with LoRAs of different ranks on all kinds of layers."""
    down, up = RECIPE.rates
    return {
        "seed": RECIPE.seed,
        "system_prompt": RECIPE.system_prompt,
        "network_module": "networks.lora_lumina",
        "network_dim": 6,
        "network_alpha": RECIPE.alpha,
        "network_args": (
            *("attn_dim=5", "mlp_dim=3", "mod_dim=2", "refiner_dim=4", "embedder_dims=[2,1,3]"),
            f"loraplus_lr_ratio={up / down}",
        ),
        "learning_rate": down,
        "optimizer_args": (
            f"betas={RECIPE.betas}".replace(" ", ""),
            f"eps={RECIPE.eps}",
            f"weight_decay={RECIPE.weight_decay}",
        ),
        "max_grad_norm": RECIPE.max_norm,
        "timestep_sampling": "nextdit_shift",
        "max_train_steps": STEPS,
        "gradient_accumulation_steps": ACCUMULATION,
        "cache_latents": True,
        "cache_text_encoder_outputs": True,
        "cache_dtype": "fp32",
        "mixed_precision": "no",
    }


def flags(options: Mapping[str, object]) -> list[str]:
    """Turn options into words: True is a bare flag, False and None none, a tuple several words."""
    words = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, tuple):
            words += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            words.append(f"--{name}={value}")
    return words
