"""Small random Kandinsky 5 transformers, for both tasks, in the names of the released files."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from library.models.kandinsky5_format import Kandinsky5Params, parameter_shapes
from tools.nano import kandinsky5_qwen, kandinsky5_text
from tools.nano.random_weights import random_tensor

T2I_PARAMS = Kandinsky5Params(
    model_dim=128,
    ff_dim=256,
    n_text_blocks=2,
    n_visual_blocks=4,
    head_dim=32,
    text_dim=kandinsky5_qwen.PARAMS.hidden,
    pooled_dim=kandinsky5_text.CLIP_PARAMS.hidden,
    time_dim=64,
    axes_dims=(8, 12, 12),
)
# The source's latents and a mask come with the noisy latents.
I2I_PARAMS = replace(T2I_PARAMS, in_channels=2 * T2I_PARAMS.latent_channels + 1)


def transformer_tensors(seed: int, params: Kandinsky5Params) -> dict[str, Tensor]:
    """Return the tensors by their names; the two kinds share all but the first layer."""
    shapes = dict(parameter_shapes(params))
    return {name: random_tensor(seed, "kandinsky5", name, shape) for name, shape in shapes.items()}


def transformer_config(p: Kandinsky5Params) -> dict[str, object]:
    """Return the config.json of `diffusers.Kandinsky5Transformer3DModel`."""
    return {
        "_class_name": "Kandinsky5Transformer3DModel",
        "in_visual_dim": p.latent_channels,
        "out_visual_dim": p.latent_channels,
        "in_text_dim": p.text_dim,
        "in_text_dim2": p.pooled_dim,
        "time_dim": p.time_dim,
        "patch_size": [1, p.patch_size, p.patch_size],
        "model_dim": p.model_dim,
        "ff_dim": p.ff_dim,
        "num_text_blocks": p.n_text_blocks,
        "num_visual_blocks": p.n_visual_blocks,
        "axes_dims": list(p.axes_dims),
        "visual_cond": p.in_channels != p.latent_channels,
        "attention_type": "regular",
    }
