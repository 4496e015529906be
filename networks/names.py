"""kohya's names of a LoRA's tensors. Torch-free."""

from __future__ import annotations

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


def kohya_name(path: str, prefix: str = "lora_unet") -> str:
    """Return kohya's name of a layer: layers.0.attention.qkv -> lora_unet_layers_0_attention_qkv."""
    return f"{prefix}_{path.replace('.', '_')}"
