"""Training and sampling of Lumina Image 2.0, written from its documents on diffusers, transformers and torch.

Nothing here comes from this repository but the keys of random numbers (`library.core.seeds`), which are ours
to define. A LoRA is a plain matrix that is added to the base weight before the forward pass, so none of what
makes the trainer fast is repeated.

Shapes: B pictures, C latent channels, h and w latent height and width, L tokens, D features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel
from PIL import Image
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import avg_pool2d
from transformers import Gemma2Model, GemmaTokenizer

from library.core import seeds

SCALE, SHIFT = 0.3611, 0.1159  # of the FLUX autoencoder
State = dict[str, Tensor]  # a LoRA file: tensors by kohya's keys


def nextdit_shift(unit: float, tokens: int) -> float:
    """Uniform, moved towards noise by e^mu; mu is 0.5 at 256 image tokens and 1.15 at 4096."""
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    return math.exp(mu) / (math.exp(mu) + 1 / unit - 1)


@dataclass(frozen=True)
class Sample:
    """One use of a picture in training: what is drawn for it is keyed by (step, micro, slot)."""

    pixels_3HW: Tensor  # in [-1, 1]
    caption: str
    step: int
    micro: int
    slot: int
    weight: float = 1.0  # of its loss
    mask_HW: Tensor | None = None  # of its loss, in 0..1


@dataclass(frozen=True)
class Recipe:
    """How a LoRA is trained.

    rates: peak learning rate of down and of up matrices. strength: what the LoRA is multiplied by in
    training. sigma: noise level, from a uniform number and the number of image tokens. error: elementwise
    loss, from the difference to the target and sigma.
    """

    seed: int
    system_prompt: str
    alpha: float
    rates: tuple[float, float]
    betas: tuple[float, float]
    eps: float  # large enough that rounding errors in tiny gradients do not decide an update's sign
    weight_decay: float
    max_norm: float
    strength: float = 1.0
    sigma: Callable[[float, int], float] = nextdit_shift
    error: Callable[[Tensor, Tensor], Tensor] = lambda difference, sigma: difference**2


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


# --- the LoRA ---


@dataclass(frozen=True)
class Place:
    """Which LoRA belongs to a weight of diffusers: kohya's name, and which rows of its up matrix."""

    name: str
    rows: slice


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


def added(
    dit: Lumina2Transformer2DModel, places: Mapping[str, Place], lora: State, strength: float = 1.0
) -> dict[str, Tensor]:
    """The weights that a LoRA changes: base + strength * alpha / rank * up @ down."""
    base, weights = dict(dit.named_parameters()), {}
    for name, place in places.items():
        key = f"lora_unet_{place.name}"
        if f"{key}.alpha" in lora:
            down, up = lora[f"{key}.lora_down.weight"], lora[f"{key}.lora_up.weight"]
            scale = strength * lora[f"{key}.alpha"] / down.shape[0]
            weights[name] = base[name] + scale * (up[place.rows] @ down)
    return weights


def start_of_lora(dit: Lumina2Transformer2DModel, ranks: Mapping[str, int], recipe: Recipe) -> State:
    """The untrained LoRA: down uniform in +-1/sqrt(in), keyed by seed and name; up zero."""
    inputs, outputs = {}, {}
    for name, place in lora_places(dit).items():
        weight = dit.get_parameter(name)
        inputs[place.name] = weight.shape[1]
        outputs[place.name] = outputs.get(place.name, 0) + weight.shape[0]
    state = {}
    for name, rank in ranks.items():
        key, columns = f"lora_unet_{name}", inputs[name]
        bound = 1 / math.sqrt(columns)
        draws = torch.empty(rank, columns)
        draws.uniform_(-bound, bound, generator=seeds.generator(recipe.seed, "lora", key))
        state[f"{key}.lora_down.weight"] = draws
        state[f"{key}.lora_up.weight"] = torch.zeros(outputs[name], rank)
        state[f"{key}.alpha"] = torch.tensor(recipe.alpha)
    return state


# --- training ---


def batch_loss(lumina: Lumina, samples: Sequence[Sample], lora: State, recipe: Recipe) -> Tensor:
    """Mean error of the velocity over a micro-batch."""
    x0 = lumina.latents(torch.stack([sample.pixels_3HW for sample in samples]))
    tokens = x0.shape[2] * x0.shape[3] // 4
    keys = [(s.step, s.micro, s.slot) for s in samples]
    sigma = torch.tensor([recipe.sigma(seeds.unit(recipe.seed, "sigma", *key), tokens) for key in keys])
    generators = [seeds.generator(recipe.seed, "noise", *key) for key in keys]
    noise = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators])
    part = sigma[:, None, None, None]
    noisy = (1 - part) * x0 + part * noise
    texts = [f"{recipe.system_prompt} <Prompt Start> {sample.caption}" for sample in samples]
    difference = lumina.velocity(noisy, sigma, texts, lora, recipe.strength) - (noise - x0)
    weights = torch.stack([sample.weight * latent_mask(sample) for sample in samples])
    return (recipe.error(difference, part) * weights).mean()


def latent_mask(sample: Sample) -> Tensor:
    """A picture's mask at an eighth of its size; all ones without one."""
    _, height, width = sample.pixels_3HW.shape
    mask = torch.ones(height, width) if sample.mask_HW is None else sample.mask_HW
    return avg_pool2d(mask[None], 8)


def train(
    lumina: Lumina, steps: Iterable[Sequence[Sequence[Sample]]], lora: State, recipe: Recipe
) -> tuple[list[float], list[float], State]:
    """Train a LoRA; return the loss and the gradient norm of each step, and the LoRA.

    steps: each is its micro-batches, and each of these its pictures.
    """
    lora = {key: value.clone().requires_grad_(not key.endswith(".alpha")) for key, value in lora.items()}
    groups = [
        {"params": [value for key, value in lora.items() if f"lora_{kind}" in key], "lr": rate}
        for kind, rate in zip(("down", "up"), recipe.rates, strict=True)
    ]
    optimizer = torch.optim.AdamW(
        groups, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay
    )
    losses, norms = [], []
    for micro_batches in steps:
        optimizer.zero_grad()
        parts = [batch_loss(lumina, samples, lora, recipe) for samples in micro_batches]
        loss = torch.stack(parts).mean()
        loss.backward()
        gradients = [value.grad for value in lora.values() if value.requires_grad]
        norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
        for gradient in gradients:
            gradient *= min(1.0, recipe.max_norm / norm)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms, {key: value.detach() for key, value in lora.items()}


# --- pictures ---


def load_pixels(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture as (3, H, W) in [-1, 1]; one that is larger than `size` is averaged down to it."""
    with Image.open(path) as picture:
        turned = picture.transpose(Image.Transpose.ROTATE_270) if _lies_on_its_side(picture) else picture
        pixels = np.asarray(turned.convert("RGB").resize(size, Image.Resampling.BOX))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1


def load_alpha(path: Path) -> Tensor | None:
    """A picture's alpha channel (H, W) in 0..1; None if it has none."""
    with Image.open(path) as picture:
        if picture.mode != "RGBA":
            return None
        return torch.from_numpy(np.asarray(picture.getchannel("A"), dtype=np.float32)) / 255


def _lies_on_its_side(picture: Image.Image) -> bool:
    return picture.getexif().get(0x0112) == 6  # EXIF orientation: to be turned by 90 degrees clockwise


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
    picture = (lumina.pixels(x)[0].clamp(-1, 1) + 1) * 127.5
    return picture.round().byte().permute(1, 2, 0).numpy()
