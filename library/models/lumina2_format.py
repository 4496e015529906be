"""The transformer of Lumina Image 2.0 as files: which layout, which sizes, which tensor is which. No torch.

Layouts: the original one (`layers.0.attention.qkv.weight`), bare or under `model.diffusion_model.` as in
ComfyUI and all-in-one checkpoints, and that of `diffusers.Lumina2Transformer2DModel`
(`layers.0.attn.to_q.weight`, ...), as a file, a folder or shards.

Sizes are read off tensor shapes, so a model of any size loads. What shapes cannot tell (how the head is
divided among the position axes, epsilons, patch size) comes from the file's metadata or the config.json
beside it, else it is as in the released 2B model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from library.core.checkpoint_files import Checkpoint, open_checkpoint
from library.core.errors import CheckpointError, ConfigError
from library.core.weight_layout import FileTensor, WeightLayout
from library.models.checkpoint_kind import refuse, require_tensors
from library.models.checkpoint_sizes import (
    NamedShape,
    Shapes,
    check_axes,
    linear_shapes,
    same_name,
)
from library.models.model_config import read_settings
from library.models.quant_file import QuantFile, read_quantised

ORIGINAL, DIFFUSERS = "original", "diffusers"
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
_WANTED = "a Lumina Image 2.0 transformer"
_UNUSED = "norm_final.weight"  # in the original file, and read by nobody
_CLASS = "Lumina2Transformer2DModel"


@dataclass(frozen=True)
class NextDiTParams:
    """Sizes and constants of the network. The defaults are those of the released 2B model."""

    dim: int = 2304
    n_layers: int = 26
    n_noise_refiners: int = 2
    n_context_refiners: int = 2
    n_heads: int = 24
    n_kv_heads: int = 8
    head_dim: int = 96
    ffn_dim: int = 9216
    cap_feat_dim: int = 2304
    time_dim: int = 1024
    time_frequencies: int = 256
    in_channels: int = 16
    patch_size: int = 2
    axes_dims: tuple[int, ...] = (32, 32, 32)
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qk_norm_eps: float = 1e-6

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch of a latent."""
        return self.patch_size**2 * self.in_channels

    @property
    def n_blocks(self) -> int:
        """Blocks of all three kinds."""
        return self.n_context_refiners + self.n_noise_refiners + self.n_layers

    @property
    def qkv_dim(self) -> int:
        """Features of queries, keys and values together."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim


@dataclass(frozen=True)
class Lumina2Checkpoint:
    """A transformer that was found whole. `sources`: parameter -> the tensors that it is joined from.

    `quant`: what of it is quantised in the file.
    """

    checkpoint: Checkpoint
    layout: str
    params: NextDiTParams
    sources: dict[str, tuple[str, ...]]
    quant: QuantFile = QuantFile()


def inspect_lumina2(path: Path) -> Lumina2Checkpoint:
    """Read the headers of a transformer and check that it is whole. No tensor is loaded.

    Args:
        path: a `.safetensors` file, an index of shards, or a folder (of the model, or of a diffusers pipeline
            with `transformer/`).

    Raises:
        CheckpointError: unreadable, truncated, of another kind, with tensors missing, extra or misshapen, or
            with settings that do not fit the shapes.
    """
    whole = open_checkpoint(path, subfolder="transformer")
    found, quant = read_quantised(whole)
    checkpoint, layout = _detect(found)
    params = _read_params(checkpoint, layout)
    name_in_file = diffusers_names if layout == DIFFUSERS else same_name
    wanted: dict[str, tuple[int, ...]] = {}
    sources: dict[str, tuple[str, ...]] = {}
    for name, shape in parameter_shapes(params):
        sources[name] = name_in_file(name)
        wanted |= _shapes_of_parts(sources[name], shape, params)
    if _UNUSED in checkpoint.tensors:
        wanted[_UNUSED] = (params.dim,)
    require_tensors(checkpoint, wanted, "Lumina Image 2.0 transformer")
    if quant.scheme is not None:
        return Lumina2Checkpoint(whole, layout, params, quant.sources(sources), quant)
    return Lumina2Checkpoint(checkpoint, layout, params, sources)


def _detect(found: Checkpoint) -> tuple[Checkpoint, str]:
    """Return the transformer's own part of the file, and its layout.

    Z-Image and other descendants share most names; what they have besides tells them apart.
    """
    for prefix in _PREFIXES:
        part = found.with_prefix_stripped(prefix) if prefix else found
        if "cap_embedder.0.weight" in part.tensors and "cap_pad_token" not in part.tensors:
            return part, ORIGINAL
        if "time_caption_embed.caption_embedder.0.weight" in part.tensors:
            return part, DIFFUSERS
    refuse(found, _WANTED)


# ---- sizes ----


def _read_params(checkpoint: Checkpoint, layout: str) -> NextDiTParams:
    """Read sizes off shapes and the rest off settings; tensors that are missing get named later."""
    naming = diffusers_names if layout == DIFFUSERS else same_name
    shapes = Shapes(checkpoint, "Lumina Image 2.0 transformer", naming)
    settings = read_settings(checkpoint, _speaks_of_lumina)
    released = NextDiTParams()
    head_dim = shapes.rows("layers.0.attention.q_norm.weight")
    heads, rest = divmod(shapes.columns("layers.0.attention.out.weight"), head_dim)
    kv_heads, odd = divmod(shapes.rows("layers.0.attention.qkv.weight") - heads * head_dim, 2 * head_dim)
    if rest or odd or kv_heads < 1 or heads % kv_heads:
        raise CheckpointError(
            f"{checkpoint.path}: attention shapes do not fit together: heads of {head_dim} features, "
            f"{shapes.rows('layers.0.attention.qkv.weight')} rows of queries, keys and values, "
            f"{shapes.columns('layers.0.attention.out.weight')} columns of output."
        )
    patch_size = settings.integer("patch_size", released.patch_size)
    params = NextDiTParams(
        dim=shapes.rows("x_embedder.weight"),
        n_layers=shapes.count("layers"),
        n_noise_refiners=shapes.count("noise_refiner"),
        n_context_refiners=shapes.count("context_refiner"),
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_dim=shapes.rows("layers.0.feed_forward.w1.weight"),
        cap_feat_dim=shapes.rows("cap_embedder.0.weight"),
        time_dim=shapes.rows("t_embedder.mlp.2.weight"),
        time_frequencies=shapes.columns("t_embedder.mlp.0.weight"),
        in_channels=shapes.columns("x_embedder.weight") // patch_size**2,
        patch_size=patch_size,
        axes_dims=settings.integers(("axes_dims", "axes_dim_rope"), _axes_of(head_dim), count=3),
        rope_theta=settings.number("rope_theta", released.rope_theta),
        norm_eps=settings.number("norm_eps", released.norm_eps),
        # diffusers builds these norms with its own constant; the original takes its norm class's default
        qk_norm_eps=settings.number("qk_norm_eps", 1e-5 if layout == DIFFUSERS else 1e-6),
    )
    check_axes(checkpoint, params.axes_dims, head_dim)
    return params


def _speaks_of_lumina(config: Mapping[str, object]) -> bool:
    return config.get("_class_name") == _CLASS or "axes_dims" in config


def _axes_of(head_dim: int) -> tuple[int, int, int]:
    """Divide a head among caption, row and column: equally, as in the 2B model; the rest to the caption."""
    spatial = head_dim // 6 * 2
    return head_dim - 2 * spatial, spatial, spatial


def settings_of(params: NextDiTParams) -> dict[str, str]:
    """Return what cannot be read off shapes, as the metadata that `inspect_lumina2` reads it from."""
    keys = ("axes_dims", "patch_size", "rope_theta", "norm_eps", "qk_norm_eps")
    return {key: json.dumps(getattr(params, key)) for key in keys}


# ---- names ----


def linear_layers(params: NextDiTParams) -> dict[str, tuple[int, int]]:
    """Return the shapes (out, in) of the network's linear layers, by their paths."""
    matrices = {name: shape for name, shape in parameter_shapes(params) if len(shape) == 2}
    return {name.removesuffix(".weight"): shape for name, shape in matrices.items()}


def quantisable_layers(params: NextDiTParams) -> list[str]:
    """Return the paths of the layers that are kept in few bits: of the blocks, but for modulation."""
    parts = ("layers.", "noise_refiner.", "context_refiner.")
    return [path for path in linear_layers(params) if path.startswith(parts) and "adaLN" not in path]


def parameter_shapes(params: NextDiTParams) -> Iterator[NamedShape]:
    """Yield every parameter of the network by its original name, with its shape."""
    p = params
    yield from linear_shapes("x_embedder", p.dim, p.patch_dim)
    yield from linear_shapes("t_embedder.mlp.0", p.time_dim, p.time_frequencies)
    yield from linear_shapes("t_embedder.mlp.2", p.time_dim, p.time_dim)
    yield "cap_embedder.0.weight", (p.cap_feat_dim,)
    yield from linear_shapes("cap_embedder.1", p.dim, p.cap_feat_dim)
    for index in range(p.n_noise_refiners):
        yield from _block(f"noise_refiner.{index}", p, modulated=True)
    for index in range(p.n_context_refiners):
        yield from _block(f"context_refiner.{index}", p, modulated=False)
    for index in range(p.n_layers):
        yield from _block(f"layers.{index}", p, modulated=True)
    yield from linear_shapes("final_layer.linear", p.patch_dim, p.dim)
    yield from linear_shapes("final_layer.adaLN_modulation.1", p.dim, p.time_dim)


def _block(name: str, p: NextDiTParams, *, modulated: bool) -> Iterator[NamedShape]:
    yield f"{name}.attention.qkv.weight", (p.qkv_dim, p.dim)
    yield f"{name}.attention.out.weight", (p.dim, p.n_heads * p.head_dim)
    yield f"{name}.attention.q_norm.weight", (p.head_dim,)
    yield f"{name}.attention.k_norm.weight", (p.head_dim,)
    yield f"{name}.feed_forward.w1.weight", (p.ffn_dim, p.dim)
    yield f"{name}.feed_forward.w2.weight", (p.dim, p.ffn_dim)
    yield f"{name}.feed_forward.w3.weight", (p.ffn_dim, p.dim)
    for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield f"{name}.{norm}.weight", (p.dim,)
    if modulated:
        yield from linear_shapes(f"{name}.adaLN_modulation.1", 4 * p.dim, p.time_dim)


def diffusers_names(name: str) -> tuple[str, ...]:
    """Return what `diffusers.Lumina2Transformer2DModel` calls a parameter: three names for the fused qkv."""
    if name.endswith(".attention.qkv.weight"):
        block = name.removesuffix(".attention.qkv.weight")
        return tuple(f"{block}.attn.to_{part}.weight" for part in "qkv")
    for pattern, replacement in _DIFFUSERS_NAMES:
        name = re.sub(pattern, replacement, name)
    return (name,)


_DIFFUSERS_NAMES = (
    (r"^t_embedder\.mlp\.0\.", "time_caption_embed.timestep_embedder.linear_1."),
    (r"^t_embedder\.mlp\.2\.", "time_caption_embed.timestep_embedder.linear_2."),
    (r"^cap_embedder\.", "time_caption_embed.caption_embedder."),
    (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear_1."),
    (r"^final_layer\.linear\.", "norm_out.linear_2."),
    (r"\.attention\.out\.", ".attn.to_out.0."),
    (r"\.attention\.([qk])_norm\.", r".attn.norm_\1."),
    (r"\.feed_forward\.w([123])\.", r".feed_forward.linear_\1."),
    (r"\.adaLN_modulation\.1\.", ".norm1.linear."),
    (r"^(context_refiner\.\d+)\.attention_norm1\.", r"\1.norm1."),
    (r"\.attention_norm1\.", ".norm1.norm."),
    (r"\.attention_norm2\.", ".norm2."),
)


def _shapes_of_parts(
    names: tuple[str, ...], shape: tuple[int, ...], params: NextDiTParams
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a parameter is joined from."""
    if len(names) == 1:
        return {names[0]: shape}
    rows = (params.n_heads, params.n_kv_heads, params.n_kv_heads)
    return {name: (heads * params.head_dim, shape[1]) for name, heads in zip(names, rows, strict=True)}


# ---- writing ----


def original_layout(params: NextDiTParams) -> WeightLayout:
    """Return what the file has that sd-scripts and ComfyUI read: names as in the original release, bare.

    `norm_final` is in it too, though no network computes with it: sd-scripts builds one that has it, and
    fails on a file that lacks it. It is written as ones, as it began.
    """
    tensors = [FileTensor(name, shape, name) for name, shape in parameter_shapes(params)]
    return WeightLayout((*tensors, FileTensor(_UNUSED, (params.dim,), None)), settings_of(params))


def diffusers_layout(params: NextDiTParams) -> WeightLayout:
    """Return what the folder has that `diffusers.Lumina2Transformer2DModel` reads.

    It always normalises queries and keys with an epsilon of 1e-5; the settings keep ours for ourselves.

    Raises:
        ConfigError: diffusers' class cannot be a network of these sizes.
    """
    tensors = []
    for parameter, shape in parameter_shapes(params):
        first_row = 0
        for name, part in _shapes_of_parts(diffusers_names(parameter), shape, params).items():
            tensors.append(FileTensor(name, part, parameter, first_row))
            first_row += part[0]
    return WeightLayout(tuple(tensors), settings_of(params), _diffusers_config(params))


def _diffusers_config(p: NextDiTParams) -> dict[str, object]:
    """Return the config.json of `diffusers.Lumina2Transformer2DModel`."""
    fixed = {
        "as many refiners of captions as of images": (p.n_context_refiners, p.n_noise_refiners),
        "heads as wide as the model divided by their number": (p.head_dim * p.n_heads, p.dim),
        "a timestep as wide as the model, but at most 1024": (p.time_dim, min(p.dim, 1024)),
        "256 frequencies of the timestep": (p.time_frequencies, 256),
        "rope_theta 10000": (p.rope_theta, 10000),
    }
    for what, (found, wanted) in fixed.items():
        if found != wanted:
            raise ConfigError(
                f"--save_format diffusers cannot be had for this model: diffusers' class for Lumina has "
                f"{what}, which would be {wanted} and is {found} here. Leave it out."
            )
    usual = p.ffn_dim == 256 * -(-4 * p.dim // 256)  # diffusers rounds 4 * dim up to a multiple of 256
    return {
        "_class_name": _CLASS,
        "axes_dim_rope": list(p.axes_dims),
        "axes_lens": [300, 512, 512],  # of the released model: longest caption, most rows and columns
        "cap_feat_dim": p.cap_feat_dim,
        # Any other width is said as the one multiple that there is between it and nothing.
        "ffn_dim_multiplier": None if usual else p.ffn_dim / (4 * p.dim),
        "hidden_size": p.dim,
        "in_channels": p.in_channels,
        "multiple_of": 256 if usual else p.ffn_dim,
        "norm_eps": p.norm_eps,
        "num_attention_heads": p.n_heads,
        "num_kv_heads": p.n_kv_heads,
        "num_layers": p.n_layers,
        "num_refiner_layers": p.n_noise_refiners,
        "patch_size": p.patch_size,
    }
