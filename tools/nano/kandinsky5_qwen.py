"""A small random Qwen2.5-VL, in the names of the released folders, and its config.json."""

from __future__ import annotations

from math import prod

from torch import Tensor

from library.models.qwen2_5_vl_format import Qwen2_5_VLParams, VisionParams, parameter_shapes
from tools.nano.random_weights import random_tensor

VISION = VisionParams(depth=2, hidden=32, heads=2, ffn_dim=48, full_attention_blocks=(1,))
PARAMS = Qwen2_5_VLParams(
    vocab=600,
    hidden=64,
    layers=3,
    heads=4,
    kv_heads=2,
    ffn_dim=128,
    mrope_section=(2, 3, 3),
    image_token_id=590,
    vision=VISION,
)


def qwen_tensors(seed: int, params: Qwen2_5_VLParams = PARAMS) -> dict[str, Tensor]:
    """Return the tensors as the released shards name them, the head that nobody needs among them."""
    tensors = {_released(name): _tensor(seed, name, shape) for name, shape in parameter_shapes(params)}
    return tensors | {"lm_head.weight": _tensor(seed, "lm_head.weight", (params.vocab, params.hidden))}


def qwen_config(params: Qwen2_5_VLParams = PARAMS) -> dict[str, object]:
    """Return the config.json as the released folders have it: flat, but for the vision tower."""
    config: dict[str, object] = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": params.vocab,
        "hidden_size": params.hidden,
        "num_hidden_layers": params.layers,
        "num_attention_heads": params.heads,
        "num_key_value_heads": params.kv_heads,
        "intermediate_size": params.ffn_dim,
        "hidden_act": "silu",
        "rms_norm_eps": params.rms_norm_eps,
        "rope_theta": params.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(params.mrope_section)},
        "use_sliding_window": False,
        "max_window_layers": params.layers,
        "tie_word_embeddings": False,
        "image_token_id": params.image_token_id,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return config if params.vision is None else config | {"vision_config": _vision_config(params)}


def _vision_config(params: Qwen2_5_VLParams) -> dict[str, object]:
    vision = params.vision
    assert vision is not None
    return {
        "model_type": "qwen2_5_vl",
        "depth": vision.depth,
        "hidden_act": "silu",
        "hidden_size": vision.hidden,
        "intermediate_size": vision.ffn_dim,
        "num_heads": vision.heads,
        "in_chans": vision.channels,
        "out_hidden_size": params.hidden,
        "patch_size": vision.patch,
        "temporal_patch_size": vision.temporal_patch,
        "spatial_merge_size": vision.merge,
        "window_size": vision.window,
        "fullatt_block_indexes": list(vision.full_attention_blocks),
    }


def _released(name: str) -> str:
    return name.replace("language_model.", "model.", 1)


def _tensor(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a random tensor; the kernel that embeds patches is drawn as the matrix that it is."""
    matrix = shape if len(shape) < 3 else (shape[0], prod(shape[1:]))
    tensor = random_tensor(seed, "qwen2_5_vl", name, matrix).view(shape)
    # Embeddings are looked up, not multiplied with, so a row's numbers are O(1) by themselves.
    return tensor * shape[1] ** 0.5 if name.endswith("embed_tokens.weight") else tensor
