"""The families that are known here, and which of them names of layers are of. Torch-free.

Names of layers in files, here of one in Lumina:

    lora_unet_layers_0_attention_qkv               kohya, musubi, and what is saved here
    transformer.layers.0.attn.to_q                 diffusers: its own layers, q, k and v apart
    diffusion_model.layers.0.attention.qkv         the original layers: ComfyUI, ai-toolkit
    base_model.model.layers.0...                   PEFT's own adapter files, Kandinsky's own trainer
    lora_transformer_layers_0_attn_to_q            OneTrainer: diffusers' layers in kohya's way
    lycoris_layers_0_attention_qkv                 LyCORIS' own wrapper
    lora_te_..., text_encoder.model...             the text encoder

Underscores cannot be turned back into dots, so a name is looked up in the family's table of layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from library.core.errors import CheckpointError
from networks.families.family import Family, Place
from networks.families.kandinsky5 import KANDINSKY5
from networks.families.lumina import LUMINA
from networks.names import DIT, TEXT_ENCODER, kohya_name

FAMILIES = (LUMINA, KANDINSKY5)
_MODEL = re.compile(
    r"(base_model\.model\.)?(model\.diffusion_model\.|diffusion_model\.|transformer\.|"
    r"lora_unet_|lora_transformer_|lycoris_(unet_)?)?"
)
_TEXT_ENCODER = re.compile(
    r"(base_model\.model\.)?(text_encoders?\.(gemma2_2b\.)?(transformer\.)?|lora_te1?_)(model[._])?"
)


def family_of(layers: Iterable[str]) -> Family | None:
    """Return the family that layers are of, by their paths or by kohya's names; None if it is not known."""
    names = [layer.removeprefix(f"{DIT}_") for layer in layers]
    return next((family for family in FAMILIES if any(map(family.place, names))), None)


def without_prefix(name: str) -> str:
    """Return a layer's name in a file without what stands for the whole model."""
    return _MODEL.sub("", name, count=1)


def place_in_file(name: str) -> Place:
    """Return kohya's name of the layer that a name in a file is of, and the part where it is of one only.

    A layer that no family has gets a name too, for messages: there is no model that has it.
    """
    if text := _TEXT_ENCODER.match(name):
        return Place(f"{TEXT_ENCODER}_" + name[text.end() :].replace(".", "_"))
    path = without_prefix(name)
    for family in FAMILIES:
        if (place := family.place(path)) is not None:
            return Place(kohya_name(place.path), place.part)
    return Place(kohya_name(path))


def check_family(path: Path, names: Iterable[str], layers: Iterable[str]) -> None:
    """Raise CheckpointError if a file's layers, by kohya's names, are of another family than a model's."""
    theirs, ours = family_of(names), family_of(layers)
    if None not in (theirs, ours) and theirs is not ours:
        raise CheckpointError(f"{path} is a LoRA for {theirs.name}, but the model is {ours.name}.")
