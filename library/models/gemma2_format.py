"""Gemma2 as files: under which prefix, which sizes, which tensor is which. No torch.

Layouts: bare `Gemma2Model` names (a folder of Hugging Face or diffusers, in one file or shards), `model.`
(causal language models, ComfyUI's `gemma_2_2b_fp16.safetensors`), and the prefix of an all-in-one checkpoint.
The prefix is read off the names themselves, so their order and what else the file holds do not matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.core.checkpoint_files import Checkpoint, open_checkpoint
from library.core.errors import CheckpointError
from library.models.checkpoint_kind import refuse, require_tensors
from library.models.model_config import Settings, config_beside, matrix_shape

_WHAT = "Gemma2 text encoder"
_MARK = re.compile(
    r"(.*?)layers\.(\d+)\.pre_feedforward_layernorm\.weight"
)  # Gemma2 and Gemma3 have such a norm
# What may stand beside the weights: the tied output head, position tables, and what ComfyUI adds.
_BESIDE = re.compile(r"lm_head\.weight|logit_scale|spiece_model|.*rotary_emb\.inv_freq")
NamedShape = tuple[str, tuple[int, ...]]


# Shapes do not tell the head width and query scale. Of the published sizes, 2B and 9B have the common ones.
_HEADS, _HEADS_OF_27B, _WIDTH_OF_27B = (256, 256), (128, 144), 4608


@dataclass(frozen=True)
class Gemma2Params:
    """Sizes and constants of the network; the constants' defaults are those of every published Gemma2."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    query_pre_attn_scalar: int = 256
    sliding_window: int = 4096
    attn_logit_softcapping: float | None = 50.0
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


@dataclass(frozen=True)
class Gemma2Checkpoint:
    """A text encoder that was found whole; the names in `checkpoint` are those of a bare `Gemma2Model`."""

    checkpoint: Checkpoint
    prefix: str
    params: Gemma2Params


def inspect_gemma2(path: Path) -> Gemma2Checkpoint:
    """Read the headers of a text encoder and check that it is whole. No tensor is loaded.

    Args:
        path: a `.safetensors` file, an index, or a folder (of the model, or a pipeline's `text_encoder/`).

    Raises:
        CheckpointError: unreadable, truncated, of another kind, or with tensors missing, extra or misshapen.
    """
    found = open_checkpoint(path, subfolder="text_encoder")
    prefixes = {match[1] for name in found.tensors if (match := _MARK.fullmatch(name))}
    if len(prefixes) != 1 or any(".self_attn.q_norm." in name for name in found.tensors):
        refuse(found, f"a {_WHAT}")
    prefix = prefixes.pop()
    inside = found.with_prefix_stripped(prefix)
    weights = {name: info for name, info in inside.tensors.items() if not _BESIDE.fullmatch(name)}
    checkpoint = Checkpoint(found.path, weights, found.metadata, found.config)
    params = _read_params(checkpoint)
    require_tensors(checkpoint, dict(parameter_shapes(params)), _WHAT)
    return Gemma2Checkpoint(checkpoint, prefix, params)


def _read_params(checkpoint: Checkpoint) -> Gemma2Params:
    """Read sizes off the shapes; what they do not tell is in the configuration, or as in published models."""
    vocab, hidden = matrix_shape(checkpoint, "embed_tokens.weight", _WHAT)
    counted = 1 + max(int(match[2]) for name in checkpoint.tensors if (match := _MARK.fullmatch(name)))
    published_head_dim, published_scalar = _HEADS_OF_27B if hidden == _WIDTH_OF_27B else _HEADS
    config = _read_config(checkpoint)
    head_dim = int(config.number("head_dim", published_head_dim))
    query_rows = matrix_shape(checkpoint, "layers.0.self_attn.q_proj.weight", _WHAT)[0]
    key_rows = matrix_shape(checkpoint, "layers.0.self_attn.k_proj.weight", _WHAT)[0]
    if query_rows % head_dim or key_rows % head_dim:
        raise CheckpointError(
            f"{checkpoint.path}: attention of {query_rows} and {key_rows} rows does not divide into heads of "
            f"{head_dim}; put the model's config.json, which says how wide heads are, beside the weights."
        )
    return Gemma2Params(
        vocab=vocab,
        hidden=hidden,
        layers=int(config.number("num_hidden_layers", counted)),
        heads=query_rows // head_dim,
        kv_heads=key_rows // head_dim,
        head_dim=head_dim,
        ffn_dim=matrix_shape(checkpoint, "layers.0.mlp.gate_proj.weight", _WHAT)[0],
        query_pre_attn_scalar=int(config.number("query_pre_attn_scalar", published_scalar)),
        sliding_window=int(config.number("sliding_window", Gemma2Params.sliding_window)),
        attn_logit_softcapping=config.number_or_none("attn_logit_softcapping", 50.0),
        rope_theta=config.number("rope_theta", Gemma2Params.rope_theta),
        rms_norm_eps=config.number("rms_norm_eps", Gemma2Params.rms_norm_eps),
    )


_FIXED = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
_LAYER_TYPES = ("sliding_attention", "full_attention")


def _read_config(checkpoint: Checkpoint) -> Settings:
    """Return the constants beside the weights; refuse a Gemma2 of another build."""
    values = config_beside(checkpoint, ("gemma2",))
    rope = values.get("rope_parameters")
    config = Settings(checkpoint.path, {**values, **(rope if isinstance(rope, dict) else {})})
    config.require(_FIXED)
    if any(kind != _LAYER_TYPES[number % 2] for number, kind in enumerate(config.listed("layer_types"))):
        config.refuse("layer_types", f"only {' and '.join(_LAYER_TYPES)} in turn are supported")
    return config


def quantisable_layers(params: Gemma2Params) -> list[str]:
    """Return the paths of the layers that are kept in few bits: all linear ones."""
    matrices = (name for name, shape in parameter_shapes(params) if len(shape) == 2)
    return [name.removesuffix(".weight") for name in matrices if name != "embed_tokens.weight"]


def parameter_shapes(p: Gemma2Params) -> Iterator[NamedShape]:
    """Yield every tensor of a bare `Gemma2Model` with its shape."""
    yield "embed_tokens.weight", (p.vocab, p.hidden)
    for i in range(p.layers):
        for part, heads in (("q_proj", p.heads), ("k_proj", p.kv_heads), ("v_proj", p.kv_heads)):
            yield f"layers.{i}.self_attn.{part}.weight", (heads * p.head_dim, p.hidden)
        yield f"layers.{i}.self_attn.o_proj.weight", (p.hidden, p.heads * p.head_dim)
        yield f"layers.{i}.mlp.gate_proj.weight", (p.ffn_dim, p.hidden)
        yield f"layers.{i}.mlp.up_proj.weight", (p.ffn_dim, p.hidden)
        yield f"layers.{i}.mlp.down_proj.weight", (p.hidden, p.ffn_dim)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"layers.{i}.{norm}_layernorm.weight", (p.hidden,)
    yield "norm.weight", (p.hidden,)
