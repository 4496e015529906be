"""Checkpoints as diffusers and transformers write them, small pictures, and training runs in other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from library.core.seeds import generator

ROOT = Path(__file__).resolve().parents[2]
# Name: size, and a caption. Buckets are 64 x 64, 80 x 48 and 48 x 80.
PHOTOS = {
    "cat": ((64, 64), "a small cat"),
    "dog": ((128, 128), "a large dog on the wooden table, looking at a coffee cup; dark city lights behind her"),
    "rocket": ((64, 64), "rocket"),
    "sky": ((80, 48), "a distant galaxy in the bright sky"),
    "woman": ((48, 80), "portrait of a smiling woman in an orange suit"),
    "man": ((80, 48), "a man with a camera"),  # lies on its side
}
SIDEWAYS = "man"


@dataclass(frozen=True)
class Run:
    """What a training run left behind."""

    folder: Path
    log: str = ""

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        text = (self.folder / "last.metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    @property
    def losses(self) -> list[float]:
        return [line["loss/current"] for line in self.metrics if "loss/current" in line]

    @property
    def norms(self) -> list[float]:
        return [line["grad_norm"] for line in self.metrics if "grad_norm" in line]

    @property
    def path(self) -> Path:
        return self.folder / "last.safetensors"

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


def launch(words: Sequence[object], cache: Path) -> str:
    """Run Python with these words; return what it wrote, or fail with that."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment(cache),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def write_photos(folder: Path) -> Path:
    """Write smooth, noisy pictures and their captions."""
    folder.mkdir()
    source = np.random.default_rng(5)
    for name, ((width, height), caption) in PHOTOS.items():
        corners = Image.fromarray(source.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        smooth = np.asarray(corners.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + source.integers(-30, 31, smooth.shape)
        exif = Image.Exif()
        if name == SIDEWAYS:
            exif[0x0112] = 6
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png", exif=exif)
        (folder / f"{name}.txt").write_text(caption + "\nnot this line\n", encoding="utf-8")
    return folder


def write_config(path: Path, photos: Path, *, batch_size: int = 2, dataset: str = "", subset: str = "") -> Path:
    """Write a dataset configuration; `dataset` and `subset` are more lines of it."""
    path.write_text(
        f"[general]\ncaption_extension = '.txt'\nenable_bucket = true\nbucket_reso_steps = 16\n"
        f"min_bucket_reso = 32\n[[datasets]]\nresolution = 64\nbatch_size = {batch_size}\n{dataset}\n"
        f"[[datasets.subsets]]\nimage_dir = '{photos}'\n{subset}\n",
        encoding="utf-8",
    )
    return path


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


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("parity") / "photos")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def train_all(
    tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> Callable[[Mapping[str, Mapping[str, object]]], dict[str, Run]]:
    """Return a function: options of training runs by name -> the runs, all made in one process."""

    def run(options: Mapping[str, Mapping[str, object]]) -> dict[str, Run]:
        folder = tmp_path_factory.mktemp("runs")
        runs = {name: Run(folder / name) for name in options}
        jobs = [flags({**given, "output_dir": runs[name].folder}) for name, given in options.items()]
        (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
        launch([ROOT / "tests/parity/train_all.py", folder / "jobs.json"], cache)
        return runs

    return run


# --- checkpoints that diffusers and transformers write ---


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder: random, in sizes and settings that only the config.json files tell."""
    from diffusers import AutoencoderKL, Lumina2Transformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    from tools.nano.gemma2 import sentencepiece_model

    folder = tmp_path_factory.mktemp("pipeline")
    dit = Lumina2Transformer2DModel(
        hidden_size=96,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=32,
        axes_dim_rope=(12, 6, 6),
        cap_feat_dim=64,
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(16, 16, 32, 32),
        norm_num_groups=16,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    gemma = Gemma2Model(
        Gemma2Config(
            vocab_size=800,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=96,
            query_pre_attn_scalar=24,
            sliding_window=16,
            attn_logit_softcapping=5.0,
        )
    )
    for name, model in (("transformer", dit), ("vae", vae), ("text_encoder", gemma)):
        randomise(model, name)
        model.save_pretrained(folder / name)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(sentencepiece_model(0))
    return folder


@torch.no_grad()
def randomise(model: nn.Module, what: str) -> None:
    """Give every weight a value of its own: what libraries start at zero or one would hide mistakes."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator(0, what, name))
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.2 * noise + (name.endswith("weight") and what != "text_encoder"))
