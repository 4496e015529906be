"""What a weight file seems to be, told from its tensor names: for messages about a wrong file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NoReturn

from library.core.checkpoint_files import Checkpoint
from library.core.errors import CheckpointError
from library.core.suggest import did_you_mean

# The first pattern that some tensor name matches decides, so a kind comes before those it resembles.
_KINDS = (
    (r"lora_(down|up|A|B)\b|\.lora_[AB]\.|\.hada_w|\.lokr_w", "a LoRA (or LoHa, LoKr), not a base model"),
    (r"text_encoders\.gemma2", "a Lumina Image 2.0 all-in-one checkpoint"),
    (r"(^|\.)(x|cap)_pad_token$", "a Z-Image transformer"),
    (r"(^|\.)cap_embedder\.0\.|caption_embedder\.0\.", "a Lumina Image 2.0 transformer"),
    (r"visual_transformer_blocks\.", "a Kandinsky 5 transformer"),
    (r"(^|\.)joint_blocks\.", "a Stable Diffusion 3 transformer"),
    (r"(^|\.)(double_blocks|single_transformer_blocks)\.0\.", "a FLUX transformer"),
    (r"conditioner\.embedders\.1\.|add_embedding\.linear_1|\.label_emb\.", "an SDXL model"),
    (r"(^|\.)(input_blocks|down_blocks\.\d\.attentions)\.", "a Stable Diffusion U-Net"),
    (r"(^|\.)post_quant_conv\.", "a Stable Diffusion or SDXL autoencoder"),
    (r"(^|\.)decoder\.conv_in\.weight$", "an image autoencoder of the FLUX kind"),
    (r"text_model\.encoder\.layers|(^|\.)embeddings\.token_embedding\.", "a CLIP text encoder"),
    (r"\.resblocks\.\d+\.attn", "a CLIP text encoder in OpenCLIP's layout"),
    (r"(^|\.)visual\.blocks\.\d+\.mlp\.gate_proj\.", "a Qwen2.5-VL"),
    (r"(^|\.)visual\.blocks\.\d+\.mlp\.fc1\.", "a Qwen2-VL"),
    (r"(^|\.)vision_(tower|model)\.|(^|\.)visual\.", "a vision-language model"),
    (r"\.self_attn\.q_norm\.", "a language model with query norms, such as Gemma3 or Qwen3"),
    (r"\.pre_feedforward_layernorm\.", "a Gemma2 text encoder"),
    (r"^(?!.*encoder\.).*\.self_attn\.q_proj\.bias$", "the language model of a Qwen2 or Qwen2.5"),
    (r"\.self_attn\.q_proj\.", "a language model that is not Gemma2"),
    (r"\.SelfAttention\.q\.", "a T5 text encoder"),
)


def kind_of(checkpoint: Checkpoint) -> str:
    """Return what the file seems to be, as words that follow "it looks like"."""
    for pattern, kind in _KINDS:
        if any(re.search(pattern, name) for name in checkpoint.tensors):
            return kind
    shown = ", ".join(list(checkpoint.tensors)[:3]) or "none at all"
    return f"nothing that is known here (its first tensors: {shown})"


def refuse(checkpoint: Checkpoint, wanted: str) -> NoReturn:
    """Raise the CheckpointError for a file that is not `wanted` ("a Gemma2 text encoder")."""
    raise CheckpointError(f"{checkpoint.path} is not {wanted}: it looks like {kind_of(checkpoint)}.")


def require_tensors(checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Check that a checkpoint holds exactly the `wanted` tensors (name -> shape); `what` is used in messages.

    Shapes are compared without trailing ones: some layouts store a 1x1 convolution as a matrix.

    Raises:
        CheckpointError: naming what is missing, extra or of another shape.
    """
    missing = [name for name in wanted if name not in checkpoint.tensors]
    if missing:
        near = did_you_mean(missing[0], checkpoint.tensors)
        raise CheckpointError(
            f"{checkpoint.path} is an incomplete {what}: {len(missing)} of {len(wanted)} tensors are missing "
            f"({_some(missing)}{near.rstrip('?')}).{shard_hint(checkpoint)}"
        )
    extra = [name for name in checkpoint.tensors if name not in wanted]
    if extra:
        raise CheckpointError(
            f"{checkpoint.path} holds {len(extra)} tensors that do not belong to a {what}: {_some(extra)}."
        )
    for name, shape in wanted.items():
        found = checkpoint.shape(name)
        if _without_trailing_ones(found) != _without_trailing_ones(shape):
            raise CheckpointError(
                f"{checkpoint.path}: '{name}' has shape {found}, but this {what} needs {shape}."
            )


def shard_hint(checkpoint: Checkpoint) -> str:
    """Return a sentence for a message about a file that is not whole, if it is one shard of several."""
    is_shard = re.search(r"-\d+-of-\d+\.safetensors$", checkpoint.path.name)
    return " It is one shard of several: name their folder or the index." if is_shard else ""


def _without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _some(names: Iterable[str], count: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
