"""Qwen2.5-VL as files: under which prefixes, which sizes, which tensor is which. No torch.

Layouts, all told from the names themselves, so their order and what else the file holds do not matter:

| written by | language model | vision tower |
| --- | --- | --- |
| the released folders, ComfyUI, `Qwen2_5_VLForConditionalGeneration` | `model.` | `visual.` |
| transformers 5 in memory | `model.language_model.` | `model.visual.` |
| `Qwen2_5_VLModel` | `language_model.` | `visual.` |
| `Qwen2_5_VLTextModel` | none | |

The head that predicts tokens (`lm_head`) is passed over, and so is the vision tower where it is not wanted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import NoReturn

from library.core.checkpoint_files import Checkpoint, TensorInfo, open_checkpoint
from library.core.errors import CheckpointError
from library.models.checkpoint_kind import refuse, require_tensors
from library.models.checkpoint_sizes import NamedShape, linear_shapes
from library.models.model_config import Settings, config_beside, matrix_shape

_WHAT = "Qwen2.5-VL text encoder"
_TEXT_MARK = re.compile(r"(.*?)layers\.(\d+)\.mlp\.gate_proj\.weight")
_QUERY_BIAS = ".self_attn.q_proj.bias"  # which Qwen3, Llama and Gemma have not
_VISION_MARK = re.compile(r"(.*?visual\.)patch_embed\.proj\.weight")
_BLOCK_MARK = re.compile(r"visual\.blocks\.(\d+)\.norm1\.weight")
# What may stand beside the weights: the output head, position tables, and what ComfyUI adds.
_BESIDE = re.compile(r"lm_head\.weight|logit_scale|.*rotary(_pos)?_emb\.inv_freq")
_QUANTISED = (
    (r"\.weight\.(absmax|quant_map|quant_state\..*)$", "in 4 or 8 bits by bitsandbytes"),
    (r"\.(qweight|qzeros|weight_packed)$", "in 4 or 8 bits, by GPTQ, AWQ or the like"),
    (r"\.weight_scale_inv$", "in fp8, by blocks"),
)
_OTHER_QWEN = {"qwen2": "Qwen2 or Qwen2.5 without vision", "qwen2_vl": "Qwen2-VL"}


@dataclass(frozen=True)
class VisionParams:
    """Sizes and constants of the vision tower; the defaults are those of every released Qwen2.5-VL."""

    depth: int = 32
    hidden: int = 1280
    heads: int = 16
    ffn_dim: int = 3420
    channels: int = 3
    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2
    window: int = 112
    full_attention_blocks: tuple[int, ...] = (7, 15, 23, 31)

    @property
    def patch_width(self) -> int:
        """How many numbers a patch of a picture has."""
        return self.channels * self.temporal_patch * self.patch**2


@dataclass(frozen=True)
class Qwen2_5_VLParams:
    """Sizes and constants of the network; the defaults are those of the released 7B.

    vision: None where the vision tower is not wanted.
    """

    vocab: int = 152064
    hidden: int = 3584
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    ffn_dim: int = 18944
    rope_theta: float = 1e6
    mrope_section: tuple[int, ...] = (16, 24, 24)
    rms_norm_eps: float = 1e-6
    image_token_id: int = 151655
    vision: VisionParams | None = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads


_RELEASED_HEAD_DIM = 128
_RELEASED_LAYERS = {2048: 36, 3584: 28, 5120: 64, 8192: 80}  # by width


@dataclass(frozen=True)
class Qwen2_5_VLCheckpoint:
    """A text encoder that was found whole.

    The names in `checkpoint` are those of `Qwen2_5_VLModel`: `language_model.` and, if wanted, `visual.`.
    """

    checkpoint: Checkpoint
    params: Qwen2_5_VLParams


def inspect_qwen2_5_vl(path: Path, *, vision: bool) -> Qwen2_5_VLCheckpoint:
    """Read the headers of a Qwen2.5-VL and check that it is whole. No tensor is loaded.

    Args:
        path: a `.safetensors` file, an index, or a folder (of the model, or a pipeline's `text_encoder/`).
        vision: whether pictures are to be shown to it; the vision tower must be there then.

    Raises:
        CheckpointError: unreadable, truncated, of another kind, quantised in a way that cannot be read, or
            with tensors missing, extra or misshapen.
    """
    found = open_checkpoint(path, subfolder="text_encoder")
    prefixes = {match[1] for name in found.tensors if (match := _TEXT_MARK.fullmatch(name))}
    if len(prefixes) != 1 or not any(name.endswith(_QUERY_BIAS) for name in found.tensors):
        refuse(found, f"a {_WHAT}")
    _check_plain(found)
    _check_generation(found)
    tensors = _language_tensors(found, prefixes.pop())
    if vision:
        tensors |= _vision_tensors(found)
    checkpoint = Checkpoint(found.path, tensors, found.metadata, found.config)
    params = _read_params(checkpoint, vision=vision)
    require_tensors(checkpoint, dict(parameter_shapes(params)), _WHAT)
    return Qwen2_5_VLCheckpoint(checkpoint, params)


def _check_plain(found: Checkpoint) -> None:
    """Refuse weights that others have quantised."""
    for pattern, how in _QUANTISED:
        if any(re.search(pattern, name) for name in found.tensors):
            raise CheckpointError(
                f"{found.path} is quantised already ({how}), which cannot be read: name a file or folder in "
                f"bf16, such as ComfyUI's qwen_2.5_vl_7b.safetensors or Qwen/Qwen2.5-VL-7B-Instruct, and "
                f"quantise it here with --text_encoder_quant."
            )


def _check_generation(found: Checkpoint) -> None:
    """Refuse a Qwen2 or Qwen2-VL: their language models have the same names and shapes."""
    if any(re.search(r"visual\.blocks\.\d+\.mlp\.fc1\.", name) for name in found.tensors):
        refuse(found, f"a {_WHAT}")
    config = config_beside(found, _OTHER_QWEN)
    width = {**config, **_table(config, "text_config")}.get("hidden_size")
    tables = (info.shape for name, info in found.tensors.items() if name.endswith("embed_tokens.weight"))
    if any(shape[1:] == (width,) for shape in tables):
        other = _OTHER_QWEN[str(config["model_type"])]
        raise CheckpointError(
            f"{found.path} is not a {_WHAT}: its config.json says that it is {other}, whose tensors have the "
            f"same names; name a Qwen2.5-VL."
        )


def _language_tensors(found: Checkpoint, prefix: str) -> dict[str, TensorInfo]:
    return _renamed(found, prefix, "language_model.", but=_vision_prefixes(found))


def _vision_tensors(found: Checkpoint) -> dict[str, TensorInfo]:
    prefixes = _vision_prefixes(found)
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{found.path} has no vision tower (tensors 'visual.*'), without which Qwen2.5-VL cannot look at "
            f"the picture that is to be edited: name a whole Qwen2.5-VL."
        )
    return _renamed(found, prefixes[0], "visual.")


def _vision_prefixes(found: Checkpoint) -> tuple[str, ...]:
    return tuple(match[1] for name in found.tensors if (match := _VISION_MARK.fullmatch(name)))


def _renamed(found: Checkpoint, prefix: str, wanted: str, but: tuple[str, ...] = ()) -> dict[str, TensorInfo]:
    """Return the tensors under one prefix, but for those under others, with another before their names."""
    return {
        wanted + name.removeprefix(prefix): info
        for name, info in found.tensors.items()
        if name.startswith(prefix) and not name.startswith(but)
        if not _BESIDE.fullmatch(name.removeprefix(prefix))
    }


def _read_params(checkpoint: Checkpoint, *, vision: bool) -> Qwen2_5_VLParams:
    """Read sizes off the shapes; what they do not tell is in the configuration, or as in the released 7B."""
    config = config_beside(checkpoint, ("qwen2_5_vl", "qwen2_5_vl_text"))
    text = _text_constants(checkpoint, config)
    vocab, hidden = matrix_shape(checkpoint, "language_model.embed_tokens.weight", _WHAT)
    layers = text.number("num_hidden_layers", _RELEASED_LAYERS.get(hidden, _count(checkpoint, _TEXT_MARK, 2)))
    heads = int(text.number("num_attention_heads", hidden // _RELEASED_HEAD_DIM))
    if not heads or hidden % heads:
        _unclear(checkpoint, f"how many heads a width of {hidden} has cannot be told")
    key_rows = matrix_shape(checkpoint, "language_model.layers.0.self_attn.k_proj.weight", _WHAT)[0]
    if key_rows % (hidden // heads):
        _unclear(checkpoint, f"keys of {key_rows} rows do not divide into heads of {hidden // heads}")
    section = text.integers(("mrope_section",), Qwen2_5_VLParams.mrope_section)
    if 2 * sum(section) != hidden // heads or len(section) != 3:
        _unclear(checkpoint, f"mrope_section {list(section)} does not fit heads of {hidden // heads}")
    return Qwen2_5_VLParams(
        vocab=vocab,
        hidden=hidden,
        layers=int(layers),
        heads=heads,
        kv_heads=key_rows // (hidden // heads),
        ffn_dim=matrix_shape(checkpoint, "language_model.layers.0.mlp.gate_proj.weight", _WHAT)[0],
        rope_theta=text.number("rope_theta", Qwen2_5_VLParams.rope_theta),
        mrope_section=section,
        rms_norm_eps=text.number("rms_norm_eps", Qwen2_5_VLParams.rms_norm_eps),
        image_token_id=int(text.number("image_token_id", Qwen2_5_VLParams.image_token_id)),
        vision=_read_vision(checkpoint, config) if vision else None,
    )


def _text_constants(checkpoint: Checkpoint, config: dict[str, object]) -> Settings:
    """Return the language model's constants, which lie flat or in `text_config`."""
    values = {**config, **_table(config, "text_config")}
    rope = _table(values, "rope_scaling") | _table(values, "rope_parameters")
    constants = Settings(checkpoint.path, {**values, **rope})
    constants.require({"hidden_act": "silu", "use_sliding_window": False})
    if rope.get("rope_type", rope.get("type")) not in (None, "default", "mrope"):
        constants.refuse("rope_type" if "rope_type" in rope else "type", "only 'default' is supported")
    return constants


def _read_vision(checkpoint: Checkpoint, config: dict[str, object]) -> VisionParams:
    constants = Settings(checkpoint.path, _table(config, "vision_config"))
    constants.require({"hidden_act": "silu"})
    usual = VisionParams()
    hidden, channels, temporal, patch = _patch_shape(checkpoint)
    merged = matrix_shape(checkpoint, "visual.merger.mlp.0.weight", _WHAT)[1]
    depth = int(constants.number("depth", _count(checkpoint, _BLOCK_MARK, 1)))
    heads = int(constants.number("num_heads", usual.heads))
    full = constants.integers(("fullatt_block_indexes",), usual.full_attention_blocks)
    if hidden % heads or hidden // heads % 4:
        _unclear(checkpoint, f"a vision tower {hidden} wide does not divide into {heads} heads")
    if any(number >= depth for number in full):
        _unclear(checkpoint, f"a vision tower of {depth} blocks has no block {max(full)}")
    return VisionParams(
        depth=depth,
        hidden=hidden,
        heads=heads,
        ffn_dim=matrix_shape(checkpoint, "visual.blocks.0.mlp.gate_proj.weight", _WHAT)[0],
        channels=channels,
        patch=patch,
        temporal_patch=temporal,
        merge=isqrt(merged // hidden),
        window=int(constants.number("window_size", usual.window)),
        full_attention_blocks=full,
    )


def _patch_shape(checkpoint: Checkpoint) -> tuple[int, int, int, int]:
    """Return width, channels, pictures and side of a patch, off the kernel that embeds patches."""
    shape = checkpoint.shape("visual.patch_embed.proj.weight")
    if len(shape) != 5:
        raise CheckpointError(
            f"{checkpoint.path}: 'visual.patch_embed.proj.weight' has shape {shape}; five sizes are needed."
        )
    return shape[:4]


def _unclear(checkpoint: Checkpoint, why: str) -> NoReturn:
    raise CheckpointError(
        f"{checkpoint.path}: {why}; put the model's config.json, which says how it is "
        f"built, beside the weights."
    )


def _count(checkpoint: Checkpoint, mark: re.Pattern[str], group: int) -> int:
    """Return how many numbered parts there are."""
    matches = (mark.fullmatch(name) for name in checkpoint.tensors)
    return 1 + max((int(match[group]) for match in matches if match), default=0)


def _table(values: dict[str, object], key: str) -> dict[str, object]:
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def quantisable_layers(p: Qwen2_5_VLParams) -> list[str]:
    """Return the linear layers of the language model, by the names of `Qwen2_5_VLModel`.

    Not those of the vision tower: it is a twelfth of the network, and its widths do not suit 4 bits.
    """
    marks = (".self_attn.", ".mlp.")
    return [
        name.removesuffix(".weight")
        for name, shape in parameter_shapes(replace(p, vision=None))
        if len(shape) == 2 and any(mark in name for mark in marks)
    ]


def parameter_shapes(p: Qwen2_5_VLParams) -> Iterator[NamedShape]:
    """Yield every tensor with its shape, by the names of `Qwen2_5_VLModel`."""
    yield "language_model.embed_tokens.weight", (p.vocab, p.hidden)
    for i in range(p.layers):
        layer = f"language_model.layers.{i}"
        for part, heads in (("q_proj", p.heads), ("k_proj", p.kv_heads), ("v_proj", p.kv_heads)):
            yield f"{layer}.self_attn.{part}.weight", (heads * p.head_dim, p.hidden)
            yield f"{layer}.self_attn.{part}.bias", (heads * p.head_dim,)
        yield f"{layer}.self_attn.o_proj.weight", (p.hidden, p.hidden)
        yield f"{layer}.mlp.gate_proj.weight", (p.ffn_dim, p.hidden)
        yield f"{layer}.mlp.up_proj.weight", (p.ffn_dim, p.hidden)
        yield f"{layer}.mlp.down_proj.weight", (p.hidden, p.ffn_dim)
        yield f"{layer}.input_layernorm.weight", (p.hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (p.hidden,)
    yield "language_model.norm.weight", (p.hidden,)
    if p.vision is not None:
        yield from _vision_shapes(p.vision, p.hidden)


def _vision_shapes(v: VisionParams, text_hidden: int) -> Iterator[NamedShape]:
    yield "visual.patch_embed.proj.weight", (v.hidden, v.channels, v.temporal_patch, v.patch, v.patch)
    for i in range(v.depth):
        block = f"visual.blocks.{i}"
        yield f"{block}.norm1.weight", (v.hidden,)
        yield f"{block}.norm2.weight", (v.hidden,)
        yield from linear_shapes(f"{block}.attn.qkv", 3 * v.hidden, v.hidden)
        yield from linear_shapes(f"{block}.attn.proj", v.hidden, v.hidden)
        yield from linear_shapes(f"{block}.mlp.gate_proj", v.ffn_dim, v.hidden)
        yield from linear_shapes(f"{block}.mlp.up_proj", v.ffn_dim, v.hidden)
        yield from linear_shapes(f"{block}.mlp.down_proj", v.hidden, v.ffn_dim)
    merged = v.merge**2 * v.hidden
    yield "visual.merger.ln_q.weight", (v.hidden,)
    yield from linear_shapes("visual.merger.mlp.0", merged, merged)
    yield from linear_shapes("visual.merger.mlp.2", text_hidden, merged)
