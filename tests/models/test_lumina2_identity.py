"""Identities change with what changes latents or text features, and with nothing else."""

import json
import shutil
from dataclasses import replace

import pytest

from library.core.hashing import HashLedger
from library.models.lumina2_identity import latent_identity, text_identity
from library.options.model import AutoencoderOptions, TextEncoderOptions
from tools.make_nano_models import make_nano_models


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_nano_models(tmp_path_factory.mktemp("nano"), layout="diffusers")


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made.ae, tmp_path / "vae")
    shutil.copytree(made.gemma2, tmp_path / "text_encoder")
    shutil.copytree(made.gemma2.parent / "tokenizer", tmp_path / "tokenizer")
    return tmp_path


def ledger(folder):
    return HashLedger(folder / "hashes.json")


def flip_last_byte(folder):
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_latents_depend_on_weights_scale_and_precision(folder):
    options = AutoencoderOptions(ae=folder / "vae")
    first = latent_identity(options, "bf16", ledger(folder))
    assert latent_identity(options, "bf16", ledger(folder)) == first
    assert latent_identity(options, "no", ledger(folder)) != first
    config = folder / "vae" / "config.json"
    old = config.read_text()
    config.write_text(json.dumps(json.loads(old) | {"scaling_factor": 0.5}))
    assert latent_identity(options, "bf16", ledger(folder)) != first
    config.write_text(old)
    assert latent_identity(options, "bf16", ledger(folder)) == first
    flip_last_byte(folder / "vae")
    assert latent_identity(options, "bf16", ledger(folder)) != first


def test_no_half_vae_is_fp32_whatever_the_precision(folder):
    half = AutoencoderOptions(ae=folder / "vae")
    full = replace(half, no_half_vae=True)
    assert latent_identity(full, "bf16", ledger(folder)) == latent_identity(half, "no", ledger(folder))


def test_where_a_file_lies_does_not_matter(folder):
    before = latent_identity(AutoencoderOptions(ae=folder / "vae"), "no", ledger(folder))
    shutil.move(folder / "vae", folder / "elsewhere")
    assert latent_identity(AutoencoderOptions(ae=folder / "elsewhere"), "no", ledger(folder)) == before


def test_texts_depend_on_weights_tokenizer_limit_and_precision(folder):
    options = TextEncoderOptions(gemma2=folder / "text_encoder")
    first = text_identity(options, "bf16", ledger(folder))
    assert text_identity(options, "bf16", ledger(folder)) == first
    assert text_identity(options, "no", ledger(folder)) != first
    assert text_identity(replace(options, gemma2_max_token_length=77), "bf16", ledger(folder)) != first
    another = folder / "another.json"
    (tokenizer,) = (folder / "tokenizer").glob("tokenizer.*")
    another = another.with_suffix(tokenizer.suffix)
    another.write_bytes(tokenizer.read_bytes() + b" ")
    assert text_identity(replace(options, gemma2_tokenizer=another), "bf16", ledger(folder)) != first
    flip_last_byte(folder / "text_encoder")
    assert text_identity(options, "bf16", ledger(folder)) != first


def test_the_system_prompt_is_in_the_keys_and_not_in_the_identity(folder):
    options = TextEncoderOptions(gemma2=folder / "text_encoder")
    with_prompt = replace(options, system_prompt="You are")
    assert text_identity(with_prompt, "no", ledger(folder)) == text_identity(options, "no", ledger(folder))
