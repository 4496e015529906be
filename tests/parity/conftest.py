"""Checkpoints as diffusers and transformers write them, and what the tests of this folder share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Timer

import pytest
import torch
from torch import nn

from library.core.seeds import generator
from tests.parity.runs import (
    Run,
    environment,
    flags,
    pipeline_flags,
    recipe_flags,
    write_config,
    write_photos,
)
from tests.warm_python import ColdPython, WarmPython


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("parity") / "photos")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def launch(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, python: WarmPython | ColdPython
) -> Callable[[Sequence[object]], str]:
    """Return a function that runs Python with these words, and returns what it wrote or fails with that."""

    def run(words: Sequence[object]) -> str:
        log = tmp_path_factory.mktemp("log") / "log.txt"
        with log.open("w") as written:
            place = written.fileno()
            script = python.start(list(map(str, words)), environment(cache), place, place)
        script.join(300)
        script.kill()
        assert script.exitcode == 0, log.read_text()
        return log.read_text()

    return run


@pytest.fixture(scope="session")
def train(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, python: WarmPython | ColdPython
) -> Iterator[Callable[..., Run]]:
    """Return a function that trains with these options; all runs share one process (training_worker.py)."""
    log = tmp_path_factory.mktemp("worker") / "log.txt"
    (jobs_read, jobs), (answers, answers_written) = os.pipe(), os.pipe()
    with log.open("w") as messages:
        worker = python.start(
            ["tests/parity/training_worker.py"],
            *(environment(cache), answers_written, messages.fileno(), jobs_read),
        )
    os.close(jobs_read), os.close(answers_written)
    with open(jobs, "w") as jobs, open(answers) as answers:

        def run(options: Mapping[str, object]) -> Run:
            folder = tmp_path_factory.mktemp("run")
            deadline = Timer(300, worker.kill)
            deadline.start()
            print(json.dumps(flags({**options, "output_dir": folder})), file=jobs, flush=True)
            answer = answers.readline()
            deadline.cancel()
            assert answer == "done\n", answer + log.read_text()[-5000:]
            return Run(folder)

        yield run
    worker.join(60)


@pytest.fixture(scope="session")
def config(photos: Path) -> Path:
    """The dataset configuration of `trained`: batches of two."""
    return write_config(photos.parent / "two.toml", photos)


@pytest.fixture(scope="session")
def trained(
    pipeline: Path,
    config: Path,
    launch: Callable[[Sequence[object]], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """RECIPE, trained by the script itself."""
    folder = tmp_path_factory.mktemp("trained")
    given = pipeline_flags(pipeline) | recipe_flags() | {"dataset_config": config, "output_dir": folder}
    launch(["lumina_train_network.py", *flags(given)])
    return Run(folder)


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
