"""The layouts in which the three models are found: how each names its tensors and splits its files."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.core.files import write_bytes
from library.models.flux_vae_format import FluxVAEParams, diffusers_name
from library.models.gemma2_format import Gemma2Params
from library.models.lumina2_format import NextDiTParams
from tools.nano import autoencoder, gemma2, nextdit
from tools.nano.files import Tensors, bytes_tensor, cast, prefixed, write_file, write_json, write_shards


@dataclass(frozen=True)
class NanoModels:
    """The tensors of the three models by their plain names, and the SentencePiece model."""

    dit: Tensors
    gemma2: Tensors
    autoencoder: Tensors
    spiece: bytes


@dataclass(frozen=True)
class NanoPaths:
    """What the model flags are given; `tokenizer` is None where the Gemma2 file has one inside."""

    dit: Path
    gemma2: Path
    ae: Path
    tokenizer: Path | None = None


def write_original(models: NanoModels, folder: Path) -> NanoPaths:
    """Three files: the DiT and AE as their authors published them, Gemma2 as ComfyUI's users download it."""
    gemma2 = prefixed(cast(models.gemma2, torch.float16), "model.")
    gemma2["spiece_model"] = bytes_tensor(models.spiece)
    return _three_files(folder, models.dit, gemma2, models.autoencoder)


def write_comfyui(models: NanoModels, folder: Path) -> NanoPaths:
    """Three files as the ComfyUI tools save them: with prefixes, and bf16."""
    gemma2 = {"spiece_model": bytes_tensor(models.spiece), "logit_scale": torch.ones(())}
    gemma2 |= prefixed(cast(models.gemma2, torch.bfloat16), "model.")
    dit = prefixed(cast(models.dit, torch.bfloat16), "model.diffusion_model.")
    return _three_files(folder, dit, gemma2, prefixed(models.autoencoder, "vae."))


def write_all_in_one(models: NanoModels, folder: Path) -> NanoPaths:
    """One file with everything, as Neta Lumina and ComfyUI checkpoints are."""
    tensors = prefixed(cast(models.dit, torch.bfloat16), "model.diffusion_model.")
    tensors |= prefixed(cast(models.gemma2, torch.bfloat16), "text_encoders.gemma2_2b.transformer.model.")
    tensors["text_encoders.gemma2_2b.logit_scale"] = torch.ones(())
    tensors["text_encoders.spiece_model"] = bytes_tensor(models.spiece)
    tensors |= prefixed(models.autoencoder, "vae.")
    file = folder / "lumina_all_in_one.safetensors"
    write_file(file, tensors)
    return NanoPaths(file, file, file)


def write_diffusers(models: NanoModels, folder: Path, *, shards: int = 1) -> NanoPaths:
    """A diffusers pipeline folder; with `shards` > 1, DiT and Gemma2 are split over files with an index."""
    stem = "diffusion_pytorch_model"
    write_shards(folder / "transformer", stem, to_diffusers_dit(models.dit), shards)
    write_shards(folder / "vae", stem, to_diffusers_autoencoder(models.autoencoder), 1)
    write_shards(folder / "text_encoder", "model", models.gemma2, shards)
    write_json(folder / "transformer" / "config.json", dit_config(nextdit.PARAMS))
    write_json(folder / "vae" / "config.json", autoencoder_config(autoencoder.PARAMS))
    write_json(folder / "text_encoder" / "config.json", gemma2_config(gemma2.PARAMS))
    write_bytes(folder / "tokenizer" / "tokenizer.model", models.spiece)
    write_json(folder / "tokenizer" / "tokenizer_config.json", _TOKENIZER_CONFIG)
    classes = {
        "transformer": ["diffusers", "Lumina2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizerFast"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    write_json(folder / "model_index.json", {"_class_name": "Lumina2Pipeline", **classes})
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 6.0, "num_train_timesteps": 1000}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    return NanoPaths(folder / "transformer", folder / "text_encoder", folder / "vae", folder / "tokenizer")


def write_sharded(models: NanoModels, folder: Path) -> NanoPaths:
    """As `write_diffusers`, with the DiT and Gemma2 in three shards each; the paths are their index files."""
    paths = write_diffusers(models, folder, shards=3)
    return NanoPaths(
        paths.dit / "diffusion_pytorch_model.safetensors.index.json",
        paths.gemma2 / "model.safetensors.index.json",
        paths.ae,
        paths.tokenizer,
    )


LAYOUTS: dict[str, Callable[[NanoModels, Path], NanoPaths]] = {
    "original": write_original,
    "comfyui": write_comfyui,
    "all_in_one": write_all_in_one,
    "diffusers": write_diffusers,
    "sharded": write_sharded,
}


def to_diffusers_dit(tensors: Tensors) -> dict[str, Tensor]:
    """Rename the original DiT tensors for `diffusers.Lumina2Transformer2DModel`; the fused qkv is split."""
    p = nextdit.PARAMS
    rows = [p.n_heads * p.head_dim, p.n_kv_heads * p.head_dim, p.n_kv_heads * p.head_dim]
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("attention.qkv.weight"):
            stem = name.removesuffix("attention.qkv.weight")
            for letter, part in zip("qkv", tensor.split(rows), strict=True):
                renamed[f"{stem}attn.to_{letter}.weight"] = part.clone()
        elif name != "norm_final.weight":  # never used; diffusers has none
            renamed[_substituted(name, _DIT_NAMES)] = tensor
    return renamed


_DIT_NAMES = (
    (r"^t_embedder\.mlp\.0\.", "time_caption_embed.timestep_embedder.linear_1."),
    (r"^t_embedder\.mlp\.2\.", "time_caption_embed.timestep_embedder.linear_2."),
    (r"^cap_embedder\.", "time_caption_embed.caption_embedder."),
    (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear_1."),
    (r"^final_layer\.linear\.", "norm_out.linear_2."),
    (r"attention\.out\.", "attn.to_out.0."),
    (r"attention\.([qk])_norm\.", r"attn.norm_\1."),
    (r"feed_forward\.w([123])\.", r"feed_forward.linear_\1."),
    (r"adaLN_modulation\.1\.", "norm1.linear."),
    (r"^(context_refiner\.\d+)\.attention_norm1\.", r"\1.norm1."),
    (r"attention_norm1\.", "norm1.norm."),
    (r"attention_norm2\.", "norm2."),
)


def to_diffusers_autoencoder(tensors: Tensors) -> dict[str, Tensor]:
    """Rename the original AE tensors for `diffusers.AutoencoderKL`."""
    renamed = {}
    for name, tensor in tensors.items():
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            tensor = tensor[:, :, 0, 0].clone()  # a 1x1 convolution there, a linear layer here
        renamed[diffusers_name(name, autoencoder.PARAMS.levels)] = tensor
    return renamed


def dit_config(p: NextDiTParams) -> dict[str, object]:
    """Return the config.json of `diffusers.Lumina2Transformer2DModel`."""
    return {
        "_class_name": "Lumina2Transformer2DModel",
        "sample_size": 32,
        "patch_size": p.patch_size,
        "in_channels": p.in_channels,
        "hidden_size": p.dim,
        "num_layers": p.n_layers,
        "num_refiner_layers": p.n_noise_refiners,
        "num_attention_heads": p.n_heads,
        "num_kv_heads": p.n_kv_heads,
        "multiple_of": 256,
        "ffn_dim_multiplier": None,
        "norm_eps": p.norm_eps,
        "scaling_factor": 1.0,
        "axes_dim_rope": list(p.axes_dims),
        "axes_lens": [300, 512, 512],
        "cap_feat_dim": p.cap_feat_dim,
    }


def autoencoder_config(p: FluxVAEParams) -> dict[str, object]:
    """Return the config.json of `diffusers.AutoencoderKL`."""
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * p.levels,
        "up_block_types": ["UpDecoderBlock2D"] * p.levels,
        "block_out_channels": list(p.channels),
        "layers_per_block": p.blocks,
        "act_fn": "silu",
        "latent_channels": p.latent_channels,
        "norm_num_groups": p.groups,
        "sample_size": 256,
        "scaling_factor": p.scale,
        "shift_factor": p.shift,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
    }


def gemma2_config(p: Gemma2Params) -> dict[str, object]:
    """Return the config.json of transformers' `Gemma2Model`."""
    return {
        "architectures": ["Gemma2Model"],
        "model_type": "gemma2",
        "vocab_size": p.vocab,
        "hidden_size": p.hidden,
        "num_hidden_layers": p.layers,
        "num_attention_heads": p.heads,
        "num_key_value_heads": p.kv_heads,
        "head_dim": p.head_dim,
        "intermediate_size": p.ffn_dim,
        "query_pre_attn_scalar": p.query_pre_attn_scalar,
        "sliding_window": p.sliding_window,
        "attn_logit_softcapping": p.attn_logit_softcapping,
        "final_logit_softcapping": 30.0,
        "rope_theta": p.rope_theta,
        "rms_norm_eps": p.rms_norm_eps,
        "max_position_embeddings": 8192,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


_TOKENIZER_CONFIG = {
    "tokenizer_class": "GemmaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}


def _substituted(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _three_files(folder: Path, dit: Tensors, gemma2: Tensors, autoencoder: Tensors) -> NanoPaths:
    paths = NanoPaths(*(folder / f"{stem}.safetensors" for stem in ("lumina", "gemma2", "ae")))
    write_file(paths.dit, dit)
    write_file(paths.gemma2, gemma2)
    write_file(paths.ae, autoencoder)
    return paths
