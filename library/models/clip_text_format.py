"""The text encoder of CLIP as files: under which prefix, which sizes, which tensor is which. No torch.

Layouts: `text_model.` (the released folders and files, which may hold the vision tower too, and ComfyUI's
`clip_l.safetensors`), no prefix (`CLIPTextModel` of transformers 5), and the prefix of an all-in-one
checkpoint, such as `cond_stage_model.transformer.text_model.`. The prefix is read off the names themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.core.checkpoint_files import Checkpoint, open_checkpoint
from library.core.errors import CheckpointError
from library.models.checkpoint_kind import refuse, require_tensors
from library.models.checkpoint_sizes import linear_shapes
from library.models.model_config import Settings, config_beside, matrix_shape

_WANTED = "a CLIP text encoder in the layout of Hugging Face"
_WHAT = "CLIP text encoder"
_MARK = re.compile(r"(.*?)embeddings\.token_embedding\.weight")
_LAYER_MARK = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.weight")
_OURS = re.compile(r"(embeddings|encoder|final_layer_norm)\.")
_TABLES = re.compile(r"embeddings\.position_ids")  # older files store the numbers 0 to 76
_MODEL_TYPES = ("clip_text_model", "clip")
_ACTIVATIONS = ("quick_gelu", "gelu")
_HEAD_DIM = 64  # of every released CLIP
NamedShape = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class ClipTextParams:
    """Sizes and constants of the network; the defaults are those of OpenAI's ViT-L/14."""

    vocab: int = 49408
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    ffn_dim: int = 3072
    positions: int = 77
    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class ClipTextCheckpoint:
    """A text encoder that was found whole; names in `checkpoint` are those of transformers 5, bare."""

    checkpoint: Checkpoint
    prefix: str
    params: ClipTextParams


def inspect_clip_text(path: Path) -> ClipTextCheckpoint:
    """Read the headers of a CLIP text encoder and check that it is whole. No tensor is loaded.

    A projection of the pooled output and the vision tower are passed over.

    Args:
        path: a `.safetensors` file, an index, or a folder (of the model, or a pipeline's `text_encoder_2/`).

    Raises:
        CheckpointError: unreadable, truncated, of another kind, or with tensors missing, extra or misshapen.
    """
    found = open_checkpoint(path, subfolder="text_encoder_2")
    prefixes = {match[1] for name in found.tensors if (match := _MARK.fullmatch(name))}
    if len(prefixes) != 1:
        refuse(found, _WANTED)
    prefix = prefixes.pop()
    inside = found.with_prefix_stripped(prefix)
    weights = {
        name: info
        for name, info in inside.tensors.items()
        if _OURS.match(name) and not _TABLES.fullmatch(name)
    }
    checkpoint = Checkpoint(found.path, weights, found.metadata, found.config)
    params = _read_params(checkpoint)
    require_tensors(checkpoint, dict(parameter_shapes(params)), _WHAT)
    return ClipTextCheckpoint(checkpoint, prefix, params)


def _read_params(checkpoint: Checkpoint) -> ClipTextParams:
    """Read sizes off the shapes; what they do not tell is in the configuration, or as in released models."""
    values = config_beside(checkpoint, _MODEL_TYPES)
    text = values.get("text_config")
    values = {"hidden_act": ClipTextParams.activation, **values, **(text if isinstance(text, dict) else {})}
    constants = Settings(checkpoint.path, values)
    if values["hidden_act"] not in _ACTIVATIONS:
        constants.refuse("hidden_act", f"only {' and '.join(_ACTIVATIONS)} are supported")
    vocab, hidden = matrix_shape(checkpoint, "embeddings.token_embedding.weight", _WHAT)
    heads = int(constants.number("num_attention_heads", max(1, hidden // _HEAD_DIM)))
    if heads < 1 or hidden % heads:
        raise CheckpointError(
            f"{checkpoint.path}: a width of {hidden} does not divide into {heads} heads; put the model's "
            f"config.json, which says how many there are, beside the weights."
        )
    matches = (_LAYER_MARK.fullmatch(name) for name in checkpoint.tensors)
    counted = 1 + max((int(match[1]) for match in matches if match), default=0)
    return ClipTextParams(
        vocab=vocab,
        hidden=hidden,
        layers=int(constants.number("num_hidden_layers", counted)),
        heads=heads,
        ffn_dim=matrix_shape(checkpoint, "encoder.layers.0.mlp.fc1.weight", _WHAT)[0],
        positions=matrix_shape(checkpoint, "embeddings.position_embedding.weight", _WHAT)[0],
        activation=str(values["hidden_act"]),
        layer_norm_eps=constants.number("layer_norm_eps", ClipTextParams.layer_norm_eps),
    )


def parameter_shapes(p: ClipTextParams) -> Iterator[NamedShape]:
    """Yield every tensor of a bare `CLIPTextModel` of transformers 5 with its shape."""
    yield "embeddings.token_embedding.weight", (p.vocab, p.hidden)
    yield "embeddings.position_embedding.weight", (p.positions, p.hidden)
    for i in range(p.layers):
        layer = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear_shapes(f"{layer}.self_attn.{part}", p.hidden, p.hidden)
        yield from linear_shapes(f"{layer}.mlp.fc1", p.ffn_dim, p.hidden)
        yield from linear_shapes(f"{layer}.mlp.fc2", p.hidden, p.ffn_dim)
        yield from _norm(f"{layer}.layer_norm1", p.hidden)
        yield from _norm(f"{layer}.layer_norm2", p.hidden)
    yield from _norm("final_layer_norm", p.hidden)


def _norm(name: str, width: int) -> Iterator[NamedShape]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)
