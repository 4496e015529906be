"""Lumina Image 2.0, written from its documents on diffusers, transformers and torch; see independent.py.

Shapes: B pictures, C latent channels, h and w latent height and width, L tokens, D features.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel
from torch import Tensor
from torch.func import functional_call
from transformers import Gemma2Model, GemmaTokenizer

from tests.parity.independent import Place, Recipe, Sample, State, added, as_bytes

SCALE, SHIFT = 0.3611, 0.1159  # of the FLUX autoencoder


class Lumina:
    """The models of a pipeline folder, as diffusers and transformers load them, in fp32."""

    def __init__(self, folder: Path) -> None:
        self.dit = Lumina2Transformer2DModel.from_pretrained(folder / "transformer").requires_grad_(False)
        self.vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
        self.gemma = Gemma2Model.from_pretrained(folder / "text_encoder", attn_implementation="eager")
        self.gemma.requires_grad_(False).eval()
        self.tokenizer = GemmaTokenizer.from_pretrained(
            folder / "tokenizer", add_bos_token=True, padding_side="right"
        )
        self.places = lora_places(self.dit)

    def latents(self, pixels_B3HW: Tensor) -> Tensor:
        """Scaled means of the posterior."""
        return (self.vae.encode(pixels_B3HW).latent_dist.mean - SHIFT) * SCALE

    def pixels(self, latents_BChw: Tensor) -> Tensor:
        """Pictures in about [-1, 1]."""
        return self.vae.decode(latents_BChw / SCALE + SHIFT, return_dict=False)[0]

    def features(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Gemma's last hidden state but one, padded to the longest text, and its mask."""
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        mask_BL = tokens["attention_mask"]
        states = self.gemma(tokens["input_ids"], mask_BL, output_hidden_states=True).hidden_states
        return states[-2], mask_BL.bool()

    def velocity(
        self, x_BChw: Tensor, sigma_B: Tensor, texts: Sequence[str], lora: State, strength: float = 1.0
    ) -> Tensor:
        """noise - x0: Lumina's clock is 1 - sigma, and its output x0 - noise."""
        features_BLD, mask_BL = self.features(texts)
        weights = added(self.dit, self.places, lora, strength)
        inputs = (x_BChw, 1 - sigma_B, features_BLD, mask_BL)
        return -functional_call(self.dit, weights, inputs, {"return_dict": False})[0]

    def predicted(
        self, noisy_BChw: Tensor, sigma_B: Tensor, samples: Sequence[Sample], lora: State, recipe: Recipe
    ) -> Tensor:
        """noise - x0, for training."""
        texts = [f"{recipe.system_prompt} <Prompt Start> {sample.caption}" for sample in samples]
        return self.velocity(noisy_BChw, sigma_B, texts, lora, recipe.strength)


def lora_places(dit: Lumina2Transformer2DModel) -> dict[str, Place]:
    """Every linear weight of diffusers' model that a LoRA file may speak of, with its place in the file."""
    parts = {
        "attn.to_out.0": "attention_out",
        "feed_forward.linear_1": "feed_forward_w1",
        "feed_forward.linear_2": "feed_forward_w2",
        "feed_forward.linear_3": "feed_forward_w3",
        "norm1.linear": "adaLN_modulation_1",
    }
    outside = {
        "norm_out.linear_1": "final_layer_adaLN_modulation_1",
        "norm_out.linear_2": "final_layer_linear",
        "x_embedder": "x_embedder",
        "time_caption_embed.timestep_embedder.linear_1": "t_embedder_mlp_0",
        "time_caption_embed.timestep_embedder.linear_2": "t_embedder_mlp_2",
        "time_caption_embed.caption_embedder.1": "cap_embedder_1",
    }
    places = {}
    for name, weight in dit.named_parameters():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or weight.ndim != 2:
            continue
        if module in outside:
            places[name] = Place(outside[module], slice(None))
            continue
        block, part = re.fullmatch(r"(\w+\.\d+)\.(.+)", module).groups()
        block = block.replace(".", "_")
        if part in ("attn.to_q", "attn.to_k", "attn.to_v"):
            places[name] = Place(f"{block}_attention_qkv", _rows_of(part[-1], dit))
        else:
            places[name] = Place(f"{block}_{parts[part]}", slice(None))
    return places


def _rows_of(letter: str, dit: Lumina2Transformer2DModel) -> slice:
    """Queries, keys and values lie in this order in the fused layer."""
    config = dit.config
    head = config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_kv_heads * head
    starts = {"q": 0, "k": queries, "v": queries + keys}
    return slice(starts[letter], starts[letter] + (queries if letter == "q" else keys))


@torch.no_grad()
def draw(
    lumina: Lumina,
    prompt: str,
    negative: str,
    lora: State,
    *,
    size: tuple[int, int],
    seed: int,
    steps: int,
    strength: float = 1.0,
    guidance: float = 3.5,
    truncation: float = 0.25,
) -> np.ndarray:
    """Draw a picture (H, W, 3) of bytes; `prompt` and `negative` are as the text encoder is given them."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=6.0)
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 16, size[1] // 8, size[0] // 8, generator=torch.Generator().manual_seed(seed))
    for timestep in scheduler.timesteps:
        sigma = timestep[None] / 1000
        v = conditional = lumina.velocity(x, sigma, [prompt], lora, strength)
        if 1 - sigma < truncation:
            unconditional = lumina.velocity(x, sigma, [negative], lora, strength)
            v = unconditional + guidance * (conditional - unconditional)
            if v.norm() > conditional.norm():
                v = v * (conditional.norm() / v.norm())
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return as_bytes(lumina.pixels(x)[0])
