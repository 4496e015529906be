"""The autoencoder against diffusers on shared random weights, in every layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from PIL import Image, ImageOps
from safetensors.torch import save_file

from library.core.seeds import generator
from library.models.flux_vae import load_flux_vae
from library.models.flux_vae_format import FluxVAEParams, parameter_shapes

CPU = torch.device("cpu")
PARAMS = FluxVAEParams(channels=(32, 64, 64, 96), blocks=2, scale=0.4, shift=0.2)
PHOTOS = Path(__file__).parents[2] / "examples" / "photos"


def random_tensors(params):
    """Weights of the original layout that keep activations O(1), none of them zero or special."""
    tensors = {}
    for name, shape in parameter_shapes(params):
        noise = torch.randn(shape, generator=generator(0, name))
        fan_in = shape[1] * shape[2] * shape[3] if len(shape) == 4 else 1
        is_gain = "norm" in name and name.endswith("weight")
        tensors[name] = noise / fan_in**0.5 if len(shape) == 4 else is_gain + 0.2 * noise
    return tensors


@pytest.fixture(scope="module")
def oracle():
    """diffusers' autoencoder with the same weights, converted by diffusers' own code."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * PARAMS.levels,
        up_block_types=["UpDecoderBlock2D"] * PARAMS.levels,
        block_out_channels=PARAMS.channels,
        layers_per_block=PARAMS.blocks,
        latent_channels=16,
        scaling_factor=PARAMS.scale,
        shift_factor=PARAMS.shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.load_state_dict(convert_ldm_vae_checkpoint(random_tensors(PARAMS), vae.config), strict=True)
    return vae.eval()


@pytest.fixture(scope="module")
def folder(oracle, tmp_path_factory):
    """A pipeline folder that diffusers wrote."""
    root = tmp_path_factory.mktemp("pipeline")
    oracle.save_pretrained(root / "vae")
    return root


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("size", [(64, 96), (40, 8), (128, 128)])
def test_equals_diffusers(oracle, folder, size):
    vae = load_flux_vae(folder, device=CPU, dtype=torch.float32)
    pixels = torch.rand((2, 3, *size), generator=generator(1, *size)) * 2 - 1
    with torch.no_grad():
        mean = oracle.encode(pixels).latent_dist.mean
        decoded = oracle.decode(mean).sample
    latents = vae.encode_mean(pixels)
    assert latents.shape == (2, 16, size[0] // 8, size[1] // 8)
    assert relative_error(latents, (mean - PARAMS.shift) * PARAMS.scale) < 1e-5
    assert relative_error(vae.decode(latents), decoded) < 1e-5


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_every_layout_is_the_same_network(oracle, tmp_path, layout, prefix):
    tensors = random_tensors(PARAMS) if layout == "original" else oracle.state_dict()
    others = {"model.diffusion_model.layers.0.weight": torch.zeros(1)} if prefix else {}
    save_file({prefix + name: t for name, t in tensors.items()} | others, tmp_path / "ae.safetensors")
    vae = load_flux_vae(tmp_path / "ae.safetensors", device=CPU, dtype=torch.float32)
    assert (vae.scale, vae.shift) == (0.3611, 0.1159)  # no config.json here: FLUX's own
    z = torch.randn((1, 16, 4, 4), generator=generator(2))
    with torch.no_grad():
        expected = oracle.decode(z / vae.scale + vae.shift).sample
    assert relative_error(vae.decode(z), expected) < 1e-5


@pytest.mark.parametrize("layout", ["original", "comfyui", "all_in_one", "diffusers", "sharded"])
def test_nano_layouts_agree(nano_in, layout):
    z = torch.randn((1, 16, 4, 6), generator=generator(3))
    reference = load_flux_vae(nano_in("original").ae, device=CPU, dtype=torch.float32)
    vae = load_flux_vae(nano_in(layout).ae, device=CPU, dtype=torch.float32)
    assert torch.equal(vae.decode(z), reference.decode(z))


def test_bf16_is_near_fp32_and_returns_fp32(folder):
    pixels = torch.rand((1, 3, 64, 64), generator=generator(4)) * 2 - 1
    exact = load_flux_vae(folder, device=CPU, dtype=torch.float32).encode_mean(pixels)
    vae = load_flux_vae(folder, device=CPU, dtype=torch.bfloat16)
    assert vae.dtype == torch.bfloat16
    latents = vae.encode_mean(pixels)
    assert latents.dtype == vae.decode(latents).dtype == torch.float32
    assert relative_error(latents, exact) < 0.05


def test_is_frozen(nano_in):
    vae = load_flux_vae(nano_in("original").ae, device=CPU, dtype=torch.float32)
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert (vae.stride, vae.latent_channels) == (8, 16)


def photo(name, size=256):
    picture = ImageOps.fit(Image.open(PHOTOS / name).convert("RGB"), (size, size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1


@pytest.mark.parametrize("name", ["astronaut.png", "cat.jpg", "coffee.jpg", "rocket.jpg"])
def test_nano_autoencoder_brings_photographs_back(nano_in, name):
    vae = load_flux_vae(nano_in("original").ae, device=CPU, dtype=torch.float32)
    pixels = photo(name)
    latents = vae.encode_mean(pixels)
    decoded = vae.decode(latents)
    mean_error = ((pixels - decoded) / 2).square().mean()
    assert -10 * mean_error.log10() > 18  # dB; a grey picture gives 5 to 13
    assert (pixels.mean((2, 3)) - decoded.mean((2, 3))).abs().max() < 0.04
    assert 0.3 < latents.std() < 1.5


def test_tiled_decode_of_one_tile_is_exact(nano_in):
    vae = load_flux_vae(nano_in("original").ae, device=CPU, dtype=torch.float32)
    latents = vae.encode_mean(photo("cat.jpg"))
    assert torch.equal(vae.decode_tiled(latents, tile=32, overlap=8), vae.decode(latents))


def test_tiled_decode_is_near_untiled(nano_in):
    vae = load_flux_vae(nano_in("original").ae, device=CPU, dtype=torch.float32)
    latents = vae.encode_mean(photo("astronaut.png"))
    whole, tiled = vae.decode(latents), vae.decode_tiled(latents, tile=20, overlap=8)
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.01
    assert (tiled - whole).abs().max() < 0.2
