"""Training of a LoRA, written from the documents on torch: what is the same for every family of models.

Nothing here comes from this repository but the keys of random numbers (`library.core.seeds`), which are ours
to define. A LoRA is a plain matrix that is added to the base weight before the forward pass, so none of what
makes the trainer fast is repeated.

Shapes: B pictures, C latent channels, h and w latent height and width, L tokens, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from library.core import seeds

State = dict[str, Tensor]  # a LoRA file: tensors by kohya's keys


def nextdit_shift(unit: float, tokens: int) -> float:
    """Uniform, moved towards noise by e^mu; mu is 0.5 at 256 image tokens and 1.15 at 4096."""
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    return math.exp(mu) / (math.exp(mu) + 1 / unit - 1)


def shift_by_three(unit: float, tokens: int, *, sigmoid_scale: float = 1.0) -> float:
    """The sampling "shift": a sigmoid of a normal number, moved towards noise."""
    s = 1 / (1 + math.exp(-sigmoid_scale * NormalDist().inv_cdf(unit)))
    return 3 * s / (1 + 2 * s)


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
    source_3HW: Tensor | None = None  # what it is an edit of, in [-1, 1]


@dataclass(frozen=True)
class Recipe:
    """How a LoRA is trained.

    rates: peak learning rate of down and of up matrices. strength: what the LoRA is multiplied by in
    training. sigma: noise level, from a uniform number and the number of image tokens. error: elementwise
    loss, from the difference to the target and sigma. system_prompt: where the family has one.
    """

    seed: int
    alpha: float
    rates: tuple[float, float]
    betas: tuple[float, float]
    eps: float  # large enough that rounding errors in tiny gradients do not decide an update's sign
    weight_decay: float
    max_norm: float
    strength: float = 1.0
    sigma: Callable[[float, int], float] = nextdit_shift
    error: Callable[[Tensor, Tensor], Tensor] = lambda difference, sigma: difference**2
    system_prompt: str = ""


@dataclass(frozen=True)
class Place:
    """Which LoRA belongs to a weight of diffusers: kohya's name, and which rows of its up matrix."""

    name: str
    rows: slice


class Model(Protocol):
    """What a family's models must offer to be trained."""

    dit: nn.Module
    places: Mapping[str, Place]  # of the linear weights that a LoRA may change, by their names in `dit`

    def latents(self, pixels_B3HW: Tensor) -> Tensor:
        """Encode pictures as the DiT takes them."""

    def predicted(
        self, noisy_BChw: Tensor, sigma_B: Tensor, samples: Sequence[Sample], lora: State, recipe: Recipe
    ) -> Tensor:
        """Predict noise - x0 with a LoRA."""


# --- the LoRA ---


def added(
    dit: nn.Module, places: Mapping[str, Place], lora: State, strength: float = 1.0
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


def start_of_lora(model: Model, ranks: Mapping[str, int], recipe: Recipe) -> State:
    """The untrained LoRA: down uniform in +-1/sqrt(in), keyed by seed and name; up zero."""
    inputs, outputs = {}, {}
    for name, place in model.places.items():
        weight = model.dit.get_parameter(name)
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


def batch_loss(model: Model, samples: Sequence[Sample], lora: State, recipe: Recipe) -> Tensor:
    """Mean error of the velocity over a micro-batch."""
    x0 = model.latents(torch.stack([sample.pixels_3HW for sample in samples]))
    tokens = x0.shape[2] * x0.shape[3] // 4
    keys = [(s.step, s.micro, s.slot) for s in samples]
    sigma = torch.tensor([recipe.sigma(seeds.unit(recipe.seed, "sigma", *key), tokens) for key in keys])
    generators = [seeds.generator(recipe.seed, "noise", *key) for key in keys]
    noise = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators])
    part = sigma[:, None, None, None]
    noisy = (1 - part) * x0 + part * noise
    difference = model.predicted(noisy, sigma, samples, lora, recipe) - (noise - x0)
    weights = torch.stack([sample.weight * latent_mask(sample) for sample in samples])
    return (recipe.error(difference, part) * weights).mean()


def latent_mask(sample: Sample) -> Tensor:
    """A picture's mask at an eighth of its size; all ones without one."""
    _, height, width = sample.pixels_3HW.shape
    mask = torch.ones(height, width) if sample.mask_HW is None else sample.mask_HW
    return avg_pool2d(mask[None], 8)


def train(
    model: Model, steps: Iterable[Sequence[Sequence[Sample]]], lora: State, recipe: Recipe
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
        parts = [batch_loss(model, samples, lora, recipe) for samples in micro_batches]
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


def load_pixels(path: Path, bucket: tuple[int, int], *, edit: Path | None = None) -> Tensor:
    """A picture as (3, H, W) in [-1, 1]: resized until it just covers the bucket, cut in the middle.

    edit: what was made of this picture. If both have the same proportions, but for the rounding of sizes,
    this one is resized and cut to where the other lands.
    """
    picture = _upright(path)
    width, height = picture.size
    if edit is not None:
        wanted = _upright(edit).size
        if min(abs(height * wanted[0] / width - wanted[1]), abs(width * wanted[1] / height - wanted[0])) <= 1:
            width, height = wanted
    scale = max(bucket[0] / width, bucket[1] / height)
    wide, high = round(width * scale), round(height * scale)
    shrinks = wide * high < picture.width * picture.height
    resized = picture.resize((wide, high), Image.Resampling.BOX if shrinks else Image.Resampling.LANCZOS)
    left, top = (wide - bucket[0]) // 2, (high - bucket[1]) // 2
    pixels = np.asarray(resized)[top : top + bucket[1], left : left + bucket[0]]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1


def load_alpha(path: Path) -> Tensor | None:
    """A picture's alpha channel (H, W) in 0..1; None if it has none."""
    with Image.open(path) as picture:
        if picture.mode != "RGBA":
            return None
        return torch.from_numpy(np.asarray(picture.getchannel("A"), dtype=np.float32)) / 255


def _upright(path: Path) -> Image.Image:
    """The colours of a picture, turned by 90 degrees clockwise if it says that it lies on its side."""
    with Image.open(path) as picture:
        lies = picture.getexif().get(0x0112) == 6
        return (picture.transpose(Image.Transpose.ROTATE_270) if lies else picture).convert("RGB")


def as_bytes(pixels_3HW: Tensor) -> np.ndarray:
    """Pixels in about [-1, 1] as a picture (H, W, 3)."""
    return ((pixels_3HW.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
