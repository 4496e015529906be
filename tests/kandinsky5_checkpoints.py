"""A pipeline folder of Kandinsky 5.0 Image in tiny, the transformer and autoencoder written by diffusers.

Its config.json tells a shift of the latents, as that of FLUX's autoencoder does; Kandinsky knows none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, Kandinsky5Transformer3DModel
from torch import nn

from library.core.seeds import generator
from tools.nano.files import write_file, write_json
from tools.nano.kandinsky5_qwen import PARAMS as QWEN
from tools.nano.kandinsky5_qwen import qwen_config, qwen_tensors
from tools.nano.kandinsky5_text import (
    CLIP_PARAMS,
    clip_config,
    clip_tensors,
    write_clip_tokenizer,
    write_qwen_tokenizer,
)


@dataclass(frozen=True)
class Kandinsky5Folder:
    """Where the parts of a pipeline lie."""

    folder: Path

    @property
    def flags(self) -> dict[str, object]:
        """The flags that name the models."""
        return {
            "pretrained_model_name_or_path": self.folder / "transformer",
            "text_encoder_qwen": self.folder / "text_encoder",
            "text_encoder_clip": self.folder / "text_encoder_2",
            "vae": self.folder / "vae",
        }


def write_pipeline(folder: Path, task: str, seed: int = 0) -> Kandinsky5Folder:
    """Write all parts of a pipeline for a task, "t2i" or "i2i"."""
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=16,
        out_visual_dim=16,
        in_text_dim=QWEN.hidden,
        in_text_dim2=CLIP_PARAMS.hidden,
        time_dim=32,
        model_dim=64,
        ff_dim=128,
        num_text_blocks=2,
        num_visual_blocks=3,
        axes_dims=(8, 12, 12),
        visual_cond=task == "i2i",
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(16, 16, 32, 32),
        norm_num_groups=16,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for name, model in (("transformer", transformer), ("vae", vae)):
        _randomise(model, seed, name)
        model.save_pretrained(folder / name)
    for name, tensors, config in (
        ("text_encoder", qwen_tensors(seed), qwen_config()),
        ("text_encoder_2", clip_tensors(seed), clip_config()),
    ):
        (folder / name).mkdir(parents=True)
        write_file(folder / name / "model.safetensors", tensors)
        write_json(folder / name / "config.json", config)
    for name, write in (("tokenizer", write_qwen_tokenizer), ("tokenizer_2", write_clip_tokenizer)):
        (folder / name).mkdir()
        write(folder / name)
    return Kandinsky5Folder(folder)


@torch.no_grad()
def _randomise(model: nn.Module, seed: int, what: str) -> None:
    """Give every weight a value of its own: what diffusers starts at zero or one would hide mistakes."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator(seed, what, name))
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.2 * noise + name.endswith("weight"))
