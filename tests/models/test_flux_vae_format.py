"""Autoencoder files: what is accepted, and what is said about the others."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.core.errors import CheckpointError
from library.models.flux_vae_format import FluxVAEParams, inspect_flux_vae, parameter_shapes


def test_the_real_file(hollow_file, tmp_path):
    shapes = dict(parameter_shapes(FluxVAEParams()))
    assert len(shapes) == 244
    assert round(sum(torch.Size(s).numel() for s in shapes.values()) / 1e6, 1) == 83.8
    found = inspect_flux_vae(hollow_file(tmp_path / "ae.safetensors", shapes))
    assert found.params == FluxVAEParams()
    assert found.layout == "original"


@pytest.fixture
def tensors(nano_in):
    return load_file(nano_in("original").ae)


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        inspect_flux_vae(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("part", "kind"), [("gemma2", "a Gemma2 text encoder"), ("dit", "a Lumina Image 2.0 transformer")]
)
def test_another_model_is_named(nano_in, part, kind):
    assert f"it looks like {kind}" in refusal(getattr(nano_in("original"), part))


def test_stable_diffusion_autoencoder_is_named(tensors, tmp_path):
    tensors["post_quant_conv.weight"] = torch.zeros(4, 4, 1, 1)
    save_file(tensors, tmp_path / "sdxl_vae.safetensors")
    assert "Stable Diffusion" in refusal(tmp_path / "sdxl_vae.safetensors")


def test_missing_extra_and_misshapen_tensors_are_named(tensors, tmp_path):
    path = tmp_path / "ae.safetensors"
    name = "decoder.up.2.block.1.conv2.bias"
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    assert re.search(rf"1 of 180 tensors are missing \({re.escape(name)}", refusal(path))
    save_file(tensors | {"decoder.up.2.attn.0.q.weight": torch.zeros(1)}, path)
    assert "decoder.up.2.attn.0.q.weight" in refusal(path)
    save_file(tensors | {name: torch.zeros(7)}, path)
    assert name in refusal(path) and "(7,)" in refusal(path)


def test_a_missing_level_is_named(tensors, tmp_path):
    path = tmp_path / "ae.safetensors"
    save_file({k: v for k, v in tensors.items() if not k.startswith("encoder.down.1.")}, path)
    assert "encoder.down.1." in refusal(path)


def test_truncated_file(nano_in, tmp_path):
    path = tmp_path / "ae.safetensors"
    path.write_bytes(nano_in("original").ae.read_bytes()[:100_000])
    assert "truncated" in refusal(path)


def test_a_config_with_a_wrong_value(nano_in, tmp_path):
    folder = nano_in("diffusers").ae
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (tmp_path / "config.json").read_text().replace("0.3611", '"0.3611"')
    (tmp_path / "config.json").write_text(config)
    assert "scaling_factor" in refusal(tmp_path)
