"""What a file is said to be, by names that the models in question really have."""

from pathlib import Path

import pytest

from library.core.checkpoint_files import Checkpoint, TensorInfo
from library.core.errors import CheckpointError
from library.models.checkpoint_kind import kind_of, refuse, require_tensors


def checkpoint(*names, shape=(1,)):
    file = Path("some.safetensors")
    return Checkpoint(file, {name: TensorInfo(file, name, shape, "F32") for name in names})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_layers_0_attention_qkv.lora_down.weight", "a LoRA"),
        ("diffusion_model.layers.0.attention.qkv.lora_A.weight", "a LoRA"),
        ("transformer.layers.0.attn.to_q.lora_A.default.weight", "a LoRA"),
        ("model.diffusion_model.cap_embedder.0.weight", "a Lumina Image 2.0 transformer"),
        ("time_caption_embed.caption_embedder.0.weight", "a Lumina Image 2.0 transformer"),
        ("text_encoders.gemma2_2b.transformer.model.norm.weight", "a Lumina Image 2.0 all-in-one"),
        ("cap_pad_token", "a Z-Image transformer"),
        ("visual_transformer_blocks.0.visual_modulation.out_layer.weight", "a Kandinsky 5 transformer"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "a Stable Diffusion 3 transformer"),
        ("double_blocks.0.img_attn.qkv.weight", "a FLUX transformer"),
        ("conditioner.embedders.1.model.ln_final.weight", "an SDXL model"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a Stable Diffusion U-Net"),
        ("first_stage_model.post_quant_conv.weight", "a Stable Diffusion or SDXL autoencoder"),
        ("decoder.conv_in.weight", "an image autoencoder"),
        ("model.layers.0.pre_feedforward_layernorm.weight", "a Gemma2 text encoder"),
        ("model.layers.0.self_attn.q_norm.weight", "a language model with query norms"),
        ("model.layers.0.self_attn.q_proj.weight", "a language model that is not Gemma2"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder"),
        ("text_model.encoder.layers.0.self_attn.q_proj.weight", "a CLIP text encoder"),
        ("some.other.weight", "nothing that is known here (its first tensors: some.other.weight)"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(checkpoint(name)).startswith(kind)


def test_an_empty_file():
    with pytest.raises(CheckpointError, match="is not a cat: it looks like nothing.*none at all"):
        refuse(checkpoint(), "a cat")


def test_exactly_the_wanted_tensors_pass():
    require_tensors(checkpoint("a", "b", shape=(3, 2)), {"a": (3, 2), "b": (3, 2, 1, 1)}, "cat")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("head", "tail"), "1 of 3 tensors are missing \\(paws"),
        (("head", "tail", "paws", "wings"), "1 tensors that do not belong to a cat: wings"),
        (("head", "tails", "paws"), "missing \\(tail; did you mean 'tails'"),
    ],
)
def test_missing_and_extra_are_named(names, message):
    with pytest.raises(CheckpointError, match=message):
        require_tensors(checkpoint(*names), dict.fromkeys(("head", "tail", "paws"), (1,)), "cat")
