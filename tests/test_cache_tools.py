"""What the cache tools make ahead of time is what training looks for."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.core.hashing import HashLedger
from library.data.sources import CachePlace, LatentSource, TextSource
from library.models.gemma2 import encode_prompts, load_gemma2
from library.models.gemma2_tokenizer import load_gemma2_tokenizer
from library.options.group import parse_options
from library.options.train import LuminaTrainOptions
from library.training.caching import Counts, PassRun, cache_latents, cache_texts
from lumina_train_network import LuminaTrainer
from tests.picture_sets import manifest_of, write_pictures
from tools.make_nano_models import make_nano_models

ROOT = Path(__file__).resolve().parents[1]
CAPTIONS = {"a": "a cat on a wall", "b": "two dogs, a ball", "c": "rain"}
PROMPT = "You are a painter."
RUN = PassRun(batch_size=1)


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return make_nano_models(tmp_path_factory.mktemp("nano"))


@pytest.fixture
def manifest(tmp_path):
    folder = write_pictures(tmp_path / "pictures", CAPTIONS, ((64, 64), (48, 64)))
    return manifest_of(folder, subset="caption_dropout_rate = 0.2\nflip_aug = true")


def run_tool(name, tmp_path, *words):
    """Run a tool on the dataset of `manifest_of`; return what it said and its exit code."""
    command = [sys.executable, f"tools/{name}.py", *map(str, words)]
    environment = {"XDG_CACHE_HOME": str(tmp_path / "xdg"), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.stderr, done.returncode


def trainer_for(nano, tmp_path, *words):
    required = {
        "pretrained_model_name_or_path": nano.dit,
        "gemma2": nano.gemma2,
        "ae": nano.ae,
        "system_prompt": PROMPT,
        "dataset_config": tmp_path / "pictures.toml",
        "network_module": "networks.lora_lumina",
        "output_dir": tmp_path,
        "output_name": "x",
    }
    flags = [f"--{name}={value}" for name, value in required.items()]
    return LuminaTrainer(parse_options(LuminaTrainOptions, [*flags, *words]))


def never():
    pytest.fail("training would load the model although the tool has encoded everything")


def test_training_finds_the_latents(nano, manifest, tmp_path):
    words = ["--ae", nano.ae, "--dataset_config", tmp_path / "pictures.toml", "--mixed_precision", "bf16"]
    said, code = run_tool("cache_latents", tmp_path, *words)
    assert code == 0, said
    assert "latents: 0 in the cache, 3 to encode" in said
    files = trainer_for(nano, tmp_path, "--mixed_precision", "bf16").model_files(
        HashLedger(tmp_path / "h.json")
    )
    for place in (CachePlace(True), CachePlace(False)):
        source = LatentSource(place, files.latent_identity)
        assert cache_latents(source, manifest.items, never, RUN) == Counts(cached=3, encoded=0)
        latents = source.get(manifest.items[0], flip=True).picture
        assert latents.shape == (16, 8, 8)


def test_training_finds_the_text_features(nano, manifest, tmp_path):
    words = [
        "--gemma2",
        nano.gemma2,
        "--dataset_config",
        tmp_path / "pictures.toml",
        "--system_prompt",
        PROMPT,
    ]
    said, code = run_tool("cache_text_encoder_outputs", tmp_path, *words, "--cache_dtype", "fp32")
    assert code == 0, said
    assert "texts: 0 in the cache, 4 to encode" in said, "three captions and the empty one"
    trainer = trainer_for(nano, tmp_path)
    files = trainer.model_files(HashLedger(tmp_path / "h.json"))
    source = TextSource(
        CachePlace(True, dtype="fp32"), files.text_identity, max_variants=16, prompt_of=trainer.format_prompt
    )
    assert cache_texts(source, manifest.items, never, RUN) == Counts(cached=4, encoded=0)
    encoder = load_gemma2(nano.gemma2, device=torch.device("cpu"), dtype=torch.float32)
    tokenizer = load_gemma2_tokenizer(nano.gemma2)
    for item in manifest.items:
        text = trainer.format_prompt(item.text)
        (expected,) = encode_prompts(encoder, tokenizer, [text], 256)
        torch.testing.assert_close(source.condition(item, item.text).tokens_LD, expected.tokens_LD)


@pytest.mark.parametrize(
    "name, words, said",
    [
        ("cache_latents", ["--ae", "nowhere.safetensors"], "nowhere.safetensors"),
        ("cache_latents", ["--ae", "{ae}", "--random_crop"], "random_crop"),
        ("cache_latents", ["--ae", "{gemma2}"], "looks like a Gemma2"),
        ("cache_latents", ["--ae", "{ae}", "--max_caption_variants", "2"], "--max_caption_variants"),
        ("cache_text_encoder_outputs", ["--gemma2", "{ae}"], "is not a Gemma2"),
        ("cache_text_encoder_outputs", ["--gemma2", "{gemma2}", "--vae_batch_size", "2"], "--vae_batch_size"),
    ],
)
def test_a_mistake_is_one_sentence(nano, manifest, tmp_path, name, words, said):
    given = [word.format(ae=nano.ae, gemma2=nano.gemma2) for word in words]
    message, code = run_tool(name, tmp_path, *given, "--dataset_config", tmp_path / "pictures.toml")
    assert code == 2
    assert said in message
    assert "Traceback" not in message
    assert not (tmp_path / "pictures" / ".flow-cache").exists()
