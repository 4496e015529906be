"""The layouts in which the models of Kandinsky 5.0 Image are found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tools.nano import autoencoder, kandinsky5_qwen, kandinsky5_text
from tools.nano.files import Tensors, cast, prefixed, write_file, write_json, write_shards
from tools.nano.kandinsky5_dit import I2I_PARAMS, T2I_PARAMS, transformer_config
from tools.nano.layouts import autoencoder_config, to_diffusers_autoencoder


@dataclass(frozen=True)
class NanoKandinsky5:
    """The tensors of the models by their plain names: both transformers, Qwen, CLIP and the autoencoder."""

    t2i: Tensors
    i2i: Tensors
    qwen: Tensors
    clip: Tensors
    autoencoder: Tensors


@dataclass(frozen=True)
class NanoKandinsky5Paths:
    """What the model flags are given; the tokenizers are None where they lie beside the encoders."""

    t2i: Path
    i2i: Path
    qwen: Path
    clip: Path
    vae: Path
    qwen_tokenizer: Path | None = None
    clip_tokenizer: Path | None = None


def write_original(models: NanoKandinsky5, folder: Path) -> NanoKandinsky5Paths:
    """As published: single files of the transformers in bf16 and of the autoencoder, folders of encoders."""
    paths = NanoKandinsky5Paths(
        folder / "kandinsky5lite_t2i.safetensors",
        folder / "kandinsky5lite_i2i.safetensors",
        folder / "qwen2_5_vl",
        folder / "clip_l",
        folder / "ae.safetensors",
    )
    write_file(paths.t2i, cast(models.t2i, torch.bfloat16))
    write_file(paths.i2i, cast(models.i2i, torch.bfloat16))
    write_file(paths.vae, models.autoencoder)
    _write_encoders(models, paths.qwen, paths.clip, shards=1)
    kandinsky5_text.write_qwen_tokenizer(paths.qwen)
    kandinsky5_text.write_clip_tokenizer(paths.clip)
    return paths


def write_comfyui(models: NanoKandinsky5, folder: Path) -> NanoKandinsky5Paths:
    """Single files with ComfyUI's prefixes, and the tokenizers in folders of their own.

    Qwen's file tells in its metadata what the sizes of the real one tell by themselves.
    """
    paths = NanoKandinsky5Paths(
        *(folder / f"{stem}.safetensors" for stem in ("kandinsky5lite_t2i", "kandinsky5lite_i2i")),
        *(folder / f"{stem}.safetensors" for stem in ("qwen_2.5_vl_7b", "clip_l", "ae")),
        qwen_tokenizer=folder / "qwen_tokenizer",
        clip_tokenizer=folder / "clip_tokenizer",
    )
    for path, tensors in ((paths.t2i, models.t2i), (paths.i2i, models.i2i)):
        write_file(path, prefixed(cast(tensors, torch.bfloat16), "model.diffusion_model."))
    config = json.dumps(kandinsky5_qwen.qwen_config())
    write_file(paths.qwen, cast(models.qwen, torch.bfloat16), {"config": config})
    write_file(paths.clip, prefixed(cast(models.clip, torch.float16), "text_model."))
    write_file(paths.vae, models.autoencoder)
    kandinsky5_text.write_qwen_tokenizer(paths.qwen_tokenizer, slow=True)
    kandinsky5_text.write_clip_tokenizer(paths.clip_tokenizer, slow=True)
    return paths


def write_diffusers(models: NanoKandinsky5, folder: Path, *, shards: int = 1) -> NanoKandinsky5Paths:
    """A diffusers pipeline folder, with the image-to-image transformer in a folder beside the other."""
    stem = "diffusion_pytorch_model"
    kinds = {"transformer": (models.t2i, T2I_PARAMS), "transformer_i2i": (models.i2i, I2I_PARAMS)}
    for name, (tensors, params) in kinds.items():
        write_shards(folder / name, stem, tensors, shards)
        write_json(folder / name / "config.json", transformer_config(params))
    write_shards(folder / "vae", stem, to_diffusers_autoencoder(models.autoencoder), 1)
    write_json(folder / "vae" / "config.json", autoencoder_config(autoencoder.PARAMS))
    _write_encoders(models, folder / "text_encoder", folder / "text_encoder_2", shards=shards)
    kandinsky5_text.write_qwen_tokenizer(folder / "tokenizer")
    kandinsky5_text.write_clip_tokenizer(folder / "tokenizer_2")
    return NanoKandinsky5Paths(*(folder / name for name in (*kinds, "text_encoder", "text_encoder_2", "vae")))


def write_sharded(models: NanoKandinsky5, folder: Path) -> NanoKandinsky5Paths:
    """As `write_diffusers`, with the transformers and Qwen in three shards each."""
    return write_diffusers(models, folder, shards=3)


LAYOUTS: dict[str, Callable[[NanoKandinsky5, Path], NanoKandinsky5Paths]] = {
    "original": write_original,
    "comfyui": write_comfyui,
    "diffusers": write_diffusers,
    "sharded": write_sharded,
}


def _write_encoders(models: NanoKandinsky5, qwen: Path, clip: Path, *, shards: int) -> None:
    write_shards(qwen, "model", cast(models.qwen, torch.bfloat16), shards)
    write_json(qwen / "config.json", kandinsky5_qwen.qwen_config())
    write_shards(clip, "model", models.clip, 1)
    write_json(clip / "config.json", kandinsky5_text.clip_config())
