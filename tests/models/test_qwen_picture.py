"""A source picture for Qwen against transformers' own processor; sizes of every kind."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from library.models.qwen_grid import MOST_PICTURE_TOKENS, picture_grid, token_count
from library.models.qwen_picture import qwen_picture
from tools.nano.kandinsky5_text import PREPROCESSOR_CONFIG

# Buckets of the official code (width, height), and the image tokens that its processor makes of them.
BUCKETS = {
    (1024, 1024): 324,
    (640, 1408): 275,
    (1408, 640): 275,
    (768, 1280): 322,
    (1280, 768): 322,
    (896, 1152): 336,
    (1152, 896): 336,
}
SIZES = [(64, 64), (96, 160), (160, 96), (256, 224), (448, 64), (66, 130), (33, 51), (16, 16), (20, 300)]


def picture(size, seed=0):
    """Noise on a slope, so that every filter has something to do."""
    width, height = size
    noise = np.random.default_rng(seed).integers(-60, 60, (height, width, 3))
    slope = np.linspace(0, 255, width)[None, :, None] + np.linspace(0, 90, height)[:, None, None]
    return (slope + noise).clip(0, 255).astype(np.uint8)


def official_half(pixels):
    """torchvision's `resize` of a uint8 tensor: floats, bilinear with antialiasing, rounded."""
    pixels_BCHW = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    size = (pixels.shape[0] // 2, pixels.shape[1] // 2)
    half_BCHW = F.interpolate(pixels_BCHW, size=size, mode="bilinear", align_corners=False, antialias=True)
    return half_BCHW.round()[0].permute(1, 2, 0).to(torch.uint8).numpy()


@pytest.mark.parametrize("size", SIZES)
def test_patches_equal_transformers(size):
    pixels = picture(size)
    processor = Qwen2VLImageProcessorPil(
        **{k: v for k, v in PREPROCESSOR_CONFIG.items() if not k.endswith(("_type", "_class"))}
    )
    wanted = processor(Image.fromarray(official_half(pixels)), return_tensors="np")
    found = qwen_picture(pixels)
    assert [list(found.grid_thw)] == wanted["image_grid_thw"].tolist()
    assert found.patches_NP.shape == (np.prod(found.grid_thw), 1176) and found.patches_NP.dtype == np.float32
    np.testing.assert_allclose(found.patches_NP, wanted["pixel_values"], atol=2e-6)
    assert picture_grid(size) == found.grid_thw
    assert token_count(found.grid_thw) * 4 == len(found.patches_NP)


def test_the_halving_matters():
    """With Pillow's default filter, or without antialiasing (means of 2x2), it is another picture."""
    pixels = picture((64, 64))
    size = (32, 32)
    half = official_half(pixels).astype(int)
    bicubic = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)).astype(int)
    means = pixels.reshape(32, 2, 32, 2, 3).astype(int).mean((1, 3))
    assert abs(half - bicubic).max() > 5 and abs(half - means).max() > 5


def test_tokens_of_the_official_buckets():
    assert {size: token_count(picture_grid(size)) for size in BUCKETS} == BUCKETS


def test_a_picture_of_the_usual_size():
    found = qwen_picture(picture((1024, 1024)))
    assert found.grid_thw == (1, 36, 36) and np.isfinite(found.patches_NP).all()


@given(width=st.integers(2, 9000), height=st.integers(2, 9000))
def test_sizes_equal_transformers(width, height):
    half = width // 2, height // 2
    grid = picture_grid((width, height))
    if max(half) / min(half) <= 200:
        rows, columns = smart_resize(half[1], half[0], 28, 3136, 765 * 28 * 28)
        assert grid == (1, rows // 14, columns // 14)
    assert min(grid) >= 1 and grid[1] % 2 == grid[2] % 2 == 0
    assert token_count(grid) <= MOST_PICTURE_TOKENS


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 900), (6000, 8), (8, 6000)])
def test_a_line_is_stretched(size):
    """Qwen's own processor refuses what is more than 200 times as long as wide."""
    found = qwen_picture(picture(size))
    assert found.grid_thw == picture_grid(size) and np.isfinite(found.patches_NP).all()
    assert 4 <= token_count(found.grid_thw) <= 500
