"""A small random NextDiT in the names and shapes of the original Lumina Image 2.0 file."""

from __future__ import annotations

from torch import Tensor

from library.models.lumina2_format import NextDiTParams, parameter_shapes
from tools.nano.random_weights import random_tensor

# In the proportions of the 2B model: grouped queries, three equal axes of positions.
PARAMS = NextDiTParams(
    dim=192,
    n_layers=4,
    n_noise_refiners=1,
    n_context_refiners=1,
    n_heads=4,
    n_kv_heads=2,
    head_dim=48,
    ffn_dim=768,
    cap_feat_dim=128,
    time_dim=192,
    axes_dims=(16, 16, 16),
)


def nextdit_tensors(seed: int) -> dict[str, Tensor]:
    """Return the tensors by their original names."""
    shapes = nextdit_shapes(PARAMS)
    return {name: random_tensor(seed, "nextdit", name, shape) for name, shape in shapes.items()}


def nextdit_shapes(params: NextDiTParams) -> dict[str, tuple[int, ...]]:
    """Return every tensor of the original file with its shape, also the norm that nobody reads."""
    return dict(parameter_shapes(params)) | {"norm_final.weight": (params.dim,)}
