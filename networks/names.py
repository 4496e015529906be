"""kohya's names of a LoRA's tensors, and peft's names of its start weights. Torch-free."""

from __future__ import annotations

import re

DOWN, UP, ALPHA, DORA = ".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale"
DIT, TEXT_ENCODER = "lora_unet", "lora_te"  # what names of layers begin with
MAGNITUDE = ".lora_magnitude_vector"  # a DoRA's in PEFT's files
ON_INPUT = ".on_input"  # of LyCORIS' ia3
STARTS = ("kaiming", "gaussian", "pissa", "pissa_niter_16", "olora")  # any number of rounds
_ANCHORED = re.compile(r"olora|pissa(_niter_[1-9][0-9]*)?")


def kohya_name(path: str, prefix: str = DIT) -> str:
    """Return kohya's name of a layer: layers.0.attention.qkv -> lora_unet_layers_0_attention_qkv."""
    return f"{prefix}_{path.replace('.', '_')}"


def is_anchored(start: str) -> bool:
    """Whether start weights of this name are a part of the layer's weight, which the LoRA must leave out."""
    return _ANCHORED.fullmatch(start) is not None
