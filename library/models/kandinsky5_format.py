"""The transformer of Kandinsky 5.0 Image as files: which sizes, which task, which tensor is which. No torch.

Tensors have the same names in the original release and in `diffusers.Kandinsky5Transformer3DModel`, so there
is one layout: as a file, a folder or shards, bare or under `model.diffusion_model.` as in ComfyUI.

Sizes are read off tensor shapes, so a model of any size loads. The width of `visual_embeddings` tells the
task: text-to-image takes the noisy latents alone, image-to-image three things side by side, which are noisy
latents, source latents and a mask. How a head is divided among the position axes comes from the file's
metadata or the config.json beside it, else it is as in all released models: a quarter for time, the rest in
halves for row and column.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from library.models.model_config import Settings, read_settings
from library.models.quant_file import QuantFile, read_quantised
from library.options.kandinsky5 import I2I, T2I

ORIGINAL = "original"
MOST_TOKENS = 1024  # of a text
MOST_PATCHES = 128  # along a side of a picture
_PIXELS = 16  # along a side of a patch
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
_WHAT = "Kandinsky 5 image transformer"
_CLASS = "Kandinsky5Transformer3DModel"
# A tensor of this name is in the transformer, and not in a LoRA for it.
_OWN = re.compile(
    r"((text|visual)_transformer_blocks\.\d+\.\w+|pooled_text_embeddings|visual_embeddings)\.\w+\.(weight|bias)"
)
_VIDEO = {1792: "Video Lite", 4096: "Video Pro"}  # by model_dim; their tensors have the same names


@dataclass(frozen=True)
class Kandinsky5Params:
    """Sizes of the network. The defaults are those of the released text-to-image model, Lite 6B.

    in_channels: of the input: latents, and for image-to-image the source's and a mask besides.
    latent_channels: of the output.
    """

    model_dim: int = 2560
    ff_dim: int = 10240
    n_text_blocks: int = 2
    n_visual_blocks: int = 50
    head_dim: int = 128
    text_dim: int = 3584
    pooled_dim: int = 768
    time_dim: int = 512
    in_channels: int = 16
    latent_channels: int = 16
    patch_size: int = 2
    axes_dims: tuple[int, ...] = (32, 48, 48)

    @property
    def task(self) -> str:
        """What the model makes pictures from: "t2i" a text, "i2i" a picture and a text."""
        return T2I if self.in_channels == self.latent_channels else I2I

    @property
    def n_blocks(self) -> int:
        """Blocks of both kinds."""
        return self.n_text_blocks + self.n_visual_blocks

    @property
    def n_heads(self) -> int:
        """Heads of every attention."""
        return self.model_dim // self.head_dim


@dataclass(frozen=True)
class Kandinsky5Checkpoint:
    """A transformer that was found whole. `sources`: parameter -> the tensor that it is, as a tuple of one.

    `quant`: what of it is quantised in the file.
    """

    checkpoint: Checkpoint
    layout: str
    params: Kandinsky5Params
    sources: dict[str, tuple[str, ...]]
    quant: QuantFile = QuantFile()


def inspect_kandinsky5(path: Path) -> Kandinsky5Checkpoint:
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
    checkpoint = _detect(found)
    params = _read_params(checkpoint)
    wanted = dict(parameter_shapes(params))
    require_tensors(checkpoint, wanted, _WHAT)
    sources = {name: same_name(name) for name in wanted}
    if quant.scheme is not None:
        return Kandinsky5Checkpoint(whole, ORIGINAL, params, quant.sources(sources), quant)
    return Kandinsky5Checkpoint(checkpoint, ORIGINAL, params, sources)


def check_text_length(tokens: int) -> None:
    """Raise ConfigError for a text that the model has no positions for."""
    if tokens > MOST_TOKENS:
        raise ConfigError(
            f"A text of {tokens} tokens is too long for Kandinsky 5, which has positions for {MOST_TOKENS}: "
            f"lower --qwen_max_token_length."
        )


def check_patches(rows: int, columns: int, what: str = "A picture") -> None:
    """Raise ConfigError for a picture that the model has no positions for."""
    if max(rows, columns) > MOST_PATCHES:
        raise ConfigError(
            f"{what} of {_PIXELS * columns}x{_PIXELS * rows} pixels is too large for Kandinsky 5, which "
            f"has positions for {_PIXELS * MOST_PATCHES} along a side: use a lower resolution."
        )


def _detect(found: Checkpoint) -> Checkpoint:
    """Return the transformer's own part of the file."""
    for prefix in _PREFIXES:
        part = found.with_prefix_stripped(prefix) if prefix else found
        if any(_OWN.fullmatch(name) for name in part.tensors):
            return part
    refuse(found, f"a {_WHAT}")


# ---- sizes ----


def _read_params(checkpoint: Checkpoint) -> Kandinsky5Params:
    """Read sizes off shapes and the rest off settings; tensors that are missing get named later."""
    shapes = Shapes(checkpoint, _WHAT)
    settings = read_settings(checkpoint, lambda config: config.get("_class_name") == _CLASS)
    model_dim = shapes.rows("visual_embeddings.in_layer.weight")
    head_dim = shapes.rows("visual_transformer_blocks.0.self_attention.query_norm.weight")
    if model_dim in _VIDEO:
        raise CheckpointError(
            f"{checkpoint.path} is Kandinsky 5 {_VIDEO[model_dim]}, a transformer for videos (its width is "
            f"{model_dim}); name one of Kandinsky 5 Image, such as kandinsky5lite_t2i.safetensors."
        )
    if model_dim % head_dim:
        raise CheckpointError(
            f"{checkpoint.path}: a width of {model_dim} cannot be divided into heads of {head_dim}."
        )
    patch_size = _patch_size(checkpoint, settings)
    in_channels, odd = divmod(shapes.columns("visual_embeddings.in_layer.weight"), patch_size**2)
    latent_channels, uneven = divmod(shapes.rows("out_layer.out_layer.weight"), patch_size**2)
    if odd or uneven or in_channels not in (latent_channels, 2 * latent_channels + 1):
        raise CheckpointError(
            f"{checkpoint.path}: the width of visual_embeddings fits neither text-to-image nor "
            f"image-to-image: {in_channels + odd / patch_size**2:g} channels in, "
            f"{latent_channels + uneven / patch_size**2:g} channels out."
        )
    params = Kandinsky5Params(
        model_dim=model_dim,
        ff_dim=shapes.rows("visual_transformer_blocks.0.feed_forward.in_layer.weight"),
        n_text_blocks=shapes.count("text_transformer_blocks"),
        n_visual_blocks=shapes.count("visual_transformer_blocks"),
        head_dim=head_dim,
        text_dim=shapes.columns("text_embeddings.in_layer.weight"),
        pooled_dim=shapes.columns("pooled_text_embeddings.in_layer.weight"),
        time_dim=shapes.rows("time_embeddings.out_layer.weight"),
        in_channels=in_channels,
        latent_channels=latent_channels,
        patch_size=patch_size,
        axes_dims=settings.integers(("axes_dims",), _axes_of(head_dim), count=3),
    )
    check_axes(checkpoint, params.axes_dims, head_dim)
    return params


def _patch_size(checkpoint: Checkpoint, settings: Settings) -> int:
    """Rows and columns of a patch; it is one picture deep."""
    released = Kandinsky5Params().patch_size
    depth, height, width = settings.integers(("patch_size",), (1, released, released), count=3)
    if depth != 1 or height != width or height < 1:
        raise CheckpointError(
            f"{checkpoint.path}: setting patch_size is {[depth, height, width]}, but must be [1, n, n]."
        )
    return height


def _axes_of(head_dim: int) -> tuple[int, int, int]:
    """Divide a head among time, row and column, as in all released models."""
    spatial = head_dim * 3 // 16 * 2
    return head_dim - 2 * spatial, spatial, spatial


def settings_of(params: Kandinsky5Params) -> dict[str, str]:
    """Return what cannot be read off shapes, as the metadata that `inspect_kandinsky5` reads it from."""
    patch = [1, params.patch_size, params.patch_size]
    return {"axes_dims": json.dumps(params.axes_dims), "patch_size": json.dumps(patch)}


# ---- names ----


def linear_layers(params: Kandinsky5Params) -> dict[str, tuple[int, int]]:
    """Return the shapes (out, in) of the network's linear layers, by their paths."""
    matrices = {name: shape for name, shape in parameter_shapes(params) if len(shape) == 2}
    return {name.removesuffix(".weight"): shape for name, shape in matrices.items()}


def quantisable_layers(params: Kandinsky5Params) -> list[str]:
    """Return the paths of the layers that are kept in few bits: of the blocks, but for modulation."""
    parts = ("text_transformer_blocks.", "visual_transformer_blocks.")
    return [path for path in linear_layers(params) if path.startswith(parts) and "_modulation." not in path]


def parameter_shapes(params: Kandinsky5Params) -> Iterator[NamedShape]:
    """Yield every parameter of the network with its shape."""
    p = params
    yield from linear_shapes("time_embeddings.in_layer", p.time_dim, p.model_dim)
    yield from linear_shapes("time_embeddings.out_layer", p.time_dim, p.time_dim)
    yield from _text_embeddings("text_embeddings", p.model_dim, p.text_dim)
    yield from _text_embeddings("pooled_text_embeddings", p.time_dim, p.pooled_dim)
    yield from linear_shapes("visual_embeddings.in_layer", p.model_dim, p.patch_size**2 * p.in_channels)
    for index in range(p.n_text_blocks):
        block = f"text_transformer_blocks.{index}"
        yield from linear_shapes(f"{block}.text_modulation.out_layer", 6 * p.model_dim, p.time_dim)
        yield from _attention(f"{block}.self_attention", p)
        yield from _feed_forward(f"{block}.feed_forward", p)
    for index in range(p.n_visual_blocks):
        block = f"visual_transformer_blocks.{index}"
        yield from linear_shapes(f"{block}.visual_modulation.out_layer", 9 * p.model_dim, p.time_dim)
        yield from _attention(f"{block}.self_attention", p)
        yield from _attention(f"{block}.cross_attention", p)
        yield from _feed_forward(f"{block}.feed_forward", p)
    yield from linear_shapes("out_layer.modulation.out_layer", 2 * p.model_dim, p.time_dim)
    yield from linear_shapes("out_layer.out_layer", p.patch_size**2 * p.latent_channels, p.model_dim)


def _text_embeddings(name: str, rows: int, columns: int) -> Iterator[NamedShape]:
    yield from linear_shapes(f"{name}.in_layer", rows, columns)
    yield f"{name}.norm.weight", (rows,)
    yield f"{name}.norm.bias", (rows,)


def _attention(name: str, p: Kandinsky5Params) -> Iterator[NamedShape]:
    for layer in ("to_query", "to_key", "to_value", "out_layer"):
        yield from linear_shapes(f"{name}.{layer}", p.model_dim, p.model_dim)
    for norm in ("query_norm", "key_norm"):
        yield f"{name}.{norm}.weight", (p.head_dim,)


def _feed_forward(name: str, p: Kandinsky5Params) -> Iterator[NamedShape]:
    yield f"{name}.in_layer.weight", (p.ff_dim, p.model_dim)
    yield f"{name}.out_layer.weight", (p.model_dim, p.ff_dim)


# ---- writing ----


def original_layout(params: Kandinsky5Params) -> WeightLayout:
    """Return what the file has that ComfyUI and others read: names as in the original release, bare."""
    tensors = [FileTensor(name, shape, name) for name, shape in parameter_shapes(params)]
    return WeightLayout(tuple(tensors), settings_of(params))


def diffusers_layout(params: Kandinsky5Params) -> WeightLayout:
    """Return what the folder has that `diffusers.Kandinsky5Transformer3DModel` reads; the names are ours."""
    p = params
    config = {
        "_class_name": _CLASS,
        "attention_type": "regular",
        "axes_dims": list(p.axes_dims),
        "ff_dim": p.ff_dim,
        "in_text_dim": p.text_dim,
        "in_text_dim2": p.pooled_dim,
        "in_visual_dim": p.latent_channels,
        "model_dim": p.model_dim,
        "num_text_blocks": p.n_text_blocks,
        "num_visual_blocks": p.n_visual_blocks,
        "out_visual_dim": p.latent_channels,
        "patch_size": [1, p.patch_size, p.patch_size],
        "time_dim": p.time_dim,
        "visual_cond": p.task == I2I,
    }
    return replace(original_layout(params), config=config)
