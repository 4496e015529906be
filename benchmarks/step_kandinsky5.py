"""Kandinsky 5.0 Image in benchmarks/step.py: ours against diffusers + peft, text-to-image.

All train LoRA on the official set of layers: queries, keys, values and outputs of self- and cross-attention,
and the feed-forward, in text and visual blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.step_parts import RANK, Family, Settings, disturb, draw_weights, fill
from library.core.device import keep_freed_memory
from library.models.kandinsky5_dit import Kandinsky5DiT
from library.models.kandinsky5_format import Kandinsky5Params, parameter_shapes, quantisable_layers
from networks.lora import LoRANetwork, LoRASize


@dataclass(frozen=True)
class Size:
    """A model and a latent size; texts have 128 tokens, later ones of a batch a little fewer."""

    params: Kandinsky5Params
    latent: int
    text: int = 128


def _params(dim: int, text_blocks: int, visual_blocks: int, head_dim: int, text_dim: int) -> Kandinsky5Params:
    side = head_dim * 3 // 8
    return Kandinsky5Params(
        model_dim=dim, ff_dim=4 * dim, n_text_blocks=text_blocks, n_visual_blocks=visual_blocks,
        head_dim=head_dim, text_dim=text_dim, axes_dims=(head_dim - 2 * side, side, side),
    )  # fmt: skip


SIZES = {
    "tiny": Size(_params(64, 2, 50, 16, 64), latent=8, text=4),
    "nano": Size(_params(192, 1, 4, 32, 192), latent=32),
    "mid": Size(_params(768, 2, 8, 64, 768), latent=64),
    "full": Size(Kandinsky5Params(), latent=128),
}


@dataclass(frozen=True)
class Work:
    """One batch."""

    latents_BCHW: Tensor
    target_BCHW: Tensor
    time_B: Tensor
    tokens: list[Tensor]
    pooled_BP: Tensor


def _lengths(settings: Settings) -> list[int]:
    text = settings.family.sizes[settings.size].text
    return [text - 7 * (index % 3) for index in range(settings.batch)]


def make_work(settings: Settings) -> Work:
    """Draw a batch; texts of a batch differ in length."""
    params, latent = settings.params, settings.family.sizes[settings.size].latent
    draw = torch.Generator().manual_seed(1)
    place = (settings.device, settings.dtype)
    shape = (settings.batch, params.in_channels, latent, latent)
    latents, target = (torch.randn(shape, generator=draw).to(settings.device) for _ in range(2))
    tokens = [torch.randn(n, params.text_dim, generator=draw).to(*place) for n in _lengths(settings)]
    pooled = torch.randn(settings.batch, params.pooled_dim, generator=draw).to(*place)
    times = torch.linspace(200, 800, settings.batch).to(settings.device)
    return Work(latents, target, times, tokens, pooled)


def make_weights(params: Kandinsky5Params, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Draw weights, by name."""
    return draw_weights(parameter_shapes(params), device, norm=lambda name: "norm.weight" in name)


def our_model(settings: Settings) -> Kandinsky5DiT:
    """Make this project's."""
    keep_freed_memory()  # as `load_kandinsky5` does
    with torch.device("meta"):
        model = Kandinsky5DiT(settings.params)
    return fill(
        model,
        make_weights(settings.params, settings.device),
        settings,
        quantisable=quantisable_layers(settings.params),
        in_fp32="time_embeddings.",
    )


def their_model(settings: Settings) -> nn.Module:
    """Make diffusers', with modulation and time in fp32, as its `from_pretrained` keeps them."""
    from diffusers import Kandinsky5Transformer3DModel

    p = settings.params
    with torch.device(settings.device):
        model = Kandinsky5Transformer3DModel(
            in_visual_dim=p.in_channels, out_visual_dim=p.latent_channels, in_text_dim=p.text_dim,
            in_text_dim2=p.pooled_dim, time_dim=p.time_dim, model_dim=p.model_dim, ff_dim=p.ff_dim,
            num_text_blocks=p.n_text_blocks, num_visual_blocks=p.n_visual_blocks, axes_dims=p.axes_dims,
        )  # fmt: skip
    model.load_state_dict(dict(make_weights(p, settings.device)))
    for name, weight in model.named_parameters():
        if "modulation" not in name and "time_embeddings" not in name:
            weight.data = weight.data.to(settings.dtype)
    if settings.checkpointing:
        model.enable_gradient_checkpointing()
    return model


def our_loss(model: Kandinsky5DiT, work: Work) -> Tensor:
    """Forward."""
    out = torch.stack(model(work.latents_BCHW.unbind(), work.time_B, work.tokens, work.pooled_BP))
    return (out.float() - work.target_BCHW).square().mean()


def their_loss(model: nn.Module, work: Work, dtype: torch.dtype) -> Tensor:
    """Forward, under autocast; texts of a batch are padded, and the network knows no mask."""
    tokens = torch.nn.utils.rnn.pad_sequence(work.tokens, batch_first=True)
    device = tokens.device
    side = torch.arange(work.latents_BCHW.shape[-1] // 2, device=device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        out_B1HWC = model(
            work.latents_BCHW.permute(0, 2, 3, 1).unsqueeze(1).to(dtype),
            tokens,
            work.time_B,
            work.pooled_BP,
            visual_rope_pos=[side[:1], side, side],
            text_rope_pos=torch.arange(tokens.shape[1], device=device),
            return_dict=False,
        )
    out = out_B1HWC.squeeze(1).permute(0, 3, 1, 2)
    return (out.float() - work.target_BCHW).square().mean()


class Ours:
    """This project."""

    packages: ClassVar[tuple[str, ...]] = ()

    def __init__(self, settings: Settings) -> None:
        self.model = our_model(settings).requires_grad_(False)
        targets = quantisable_layers(settings.params)
        self.network = LoRANetwork(self.model, {path: LoRASize(RANK, RANK) for path in targets})
        self.network.to(settings.device).apply_to(self.model)  # swapped layers are elsewhere
        self.trained = list(self.network.parameters())
        disturb(self.trained)

    def loss(self, work: Work) -> Tensor:
        """Forward."""
        return our_loss(self.model, work)


class Rival:
    """diffusers + peft, as diffusers' own LoRA scripts use them: fp32 adapters under autocast."""

    packages: ClassVar[tuple[str, ...]] = ("diffusers", "peft")

    def __init__(self, settings: Settings) -> None:
        from peft import LoraConfig

        self.dtype = settings.dtype
        self.model = their_model(settings).requires_grad_(False)
        targets = quantisable_layers(settings.params)
        self.model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        for weight in self.trained:
            weight.data = weight.data.float()
        disturb(self.trained)

    def loss(self, work: Work) -> Tensor:
        """Forward."""
        return their_loss(self.model, work, self.dtype)


def useful_flops(settings: Settings) -> float:
    """Floating-point operations of the products that a step needs, see benchmarks/step.py."""
    p, size = settings.params, settings.family.sizes[settings.size]
    image = (size.latent // p.patch_size) ** 2
    square, feed_forward = p.model_dim**2, 2 * p.model_dim * p.ff_dim
    total = 0.0
    for text in _lengths(settings):
        for blocks, weights, pairs in (
            (p.n_text_blocks, text * (4 * square + feed_forward), text**2),
            (
                p.n_visual_blocks,
                image * (6 * square + feed_forward) + text * 2 * square,
                image * (image + text),
            ),
        ):
            linear = 2 * 2 * weights  # forward, and backward to the input
            attention = 3 * 4 * pairs * p.model_dim  # forward, and twice that backward
            total += blocks * (linear + attention)
            if settings.checkpointing:
                total += blocks * (linear / 2 + attention / 3)
    return total


def tokens(settings: Settings) -> int:
    """Tokens of a batch."""
    size = settings.family.sizes[settings.size]
    return settings.batch * (size.latent // settings.params.patch_size) ** 2 + sum(_lengths(settings))


KANDINSKY5 = Family("kandinsky5", SIZES, {"ours": Ours, "diffusers": Rival}, make_work, useful_flops, tokens)
