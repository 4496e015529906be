"""Lumina Image 2.0 in benchmarks/step.py: ours, diffusers + peft, the reference tool's arithmetic.

"reference" is benchmarks/reference_model.py: what sd-scripts computes, in plain torch, and not that tool
itself. All train LoRA on attention and feed-forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.reference_model import ReferenceModel
from benchmarks.step_parts import RANK, Family, Settings, disturb, draw_weights, fill
from library.core.device import keep_freed_memory
from library.models.lumina2_format import (
    NextDiTParams,
    diffusers_names,
    parameter_shapes,
    quantisable_layers,
)
from library.models.nextdit import NextDiT
from networks.lora import LoRANetwork, LoRASize, linear_layers


@dataclass(frozen=True)
class Size:
    """A model and a latent size; captions have 60 tokens, later ones of a batch a little fewer."""

    params: NextDiTParams
    latent: int
    caption: int = 60


def _params(
    dim: int, heads: int, kv_heads: int, layers: int, refiners: int, axes: tuple[int, int, int]
) -> NextDiTParams:
    return NextDiTParams(
        dim=dim, n_layers=layers, n_noise_refiners=refiners, n_context_refiners=refiners, n_heads=heads,
        n_kv_heads=kv_heads, head_dim=dim // heads, ffn_dim=4 * dim, cap_feat_dim=dim,
        time_dim=min(dim, 1024),
        axes_dims=axes, qk_norm_eps=1e-5,
    )  # fmt: skip


SIZES = {
    "tiny": Size(_params(64, 4, 2, 26, 2, (4, 6, 6)), latent=8, caption=4),
    "nano": Size(_params(192, 4, 2, 4, 1, (16, 16, 16)), latent=32),
    "mid": Size(_params(768, 12, 4, 8, 2, (24, 20, 20)), latent=64),
    "full": Size(_params(2304, 24, 8, 26, 2, (32, 32, 32)), latent=128),
}


@dataclass(frozen=True)
class Work:
    """One batch."""

    latents_BCHW: Tensor
    target_BCHW: Tensor
    t_B: Tensor
    captions: list[Tensor]


def make_work(settings: Settings) -> Work:
    """Draw a batch; captions of a batch differ in length."""
    size, draw = settings.family.sizes[settings.size], torch.Generator().manual_seed(1)
    shape = (settings.batch, settings.params.in_channels, size.latent, size.latent)
    latents, target = (torch.randn(shape, generator=draw).to(settings.device) for _ in range(2))
    lengths = [size.caption - 7 * (index % 3) for index in range(settings.batch)]
    captions = [torch.randn(n, settings.params.cap_feat_dim, generator=draw) for n in lengths]
    captions = [caption.to(settings.device, settings.dtype) for caption in captions]
    return Work(latents, target, torch.linspace(0.2, 0.8, settings.batch).to(settings.device), captions)


def make_weights(params: NextDiTParams, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Draw weights, by original name."""
    return draw_weights(parameter_shapes(params), device, norm=lambda name: True)


def our_model(settings: Settings) -> NextDiT:
    """Make this project's."""
    keep_freed_memory()  # as `load_nextdit` does
    with torch.device("meta"):
        model = NextDiT(settings.params)
    return fill(
        model,
        make_weights(settings.params, settings.device),
        settings,
        quantisable=quantisable_layers(settings.params),
        in_fp32="t_embedder.",
    )


def their_model(settings: Settings) -> nn.Module:
    """Make diffusers', all of it in one dtype."""
    from diffusers import Lumina2Transformer2DModel

    p = settings.params
    with torch.device(settings.device):
        model = Lumina2Transformer2DModel(
            sample_size=128, patch_size=p.patch_size, in_channels=p.in_channels, hidden_size=p.dim,
            num_layers=p.n_layers, num_refiner_layers=p.n_noise_refiners, num_attention_heads=p.n_heads,
            num_kv_heads=p.n_kv_heads, axes_dim_rope=p.axes_dims, cap_feat_dim=p.cap_feat_dim,
        )  # fmt: skip
    model.load_state_dict(_for_diffusers(dict(make_weights(p, settings.device)), p))
    if settings.checkpointing:
        model.enable_gradient_checkpointing()
    return model.to(settings.dtype)


def our_loss(model: NextDiT, work: Work) -> Tensor:
    """Forward."""
    out = torch.stack(model(work.latents_BCHW.unbind(), work.t_B, work.captions))
    return (out.float() - work.target_BCHW).square().mean()


def their_loss(model: nn.Module, work: Work, dtype: torch.dtype) -> Tensor:
    """Forward, under autocast; captions are padded and masked, as this implementation needs them."""
    captions = torch.nn.utils.rnn.pad_sequence(work.captions, batch_first=True)
    device = captions.device
    lengths = torch.tensor([len(caption) for caption in work.captions], device=device)
    mask = torch.arange(captions.shape[1], device=device) < lengths[:, None]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        out = model(work.latents_BCHW.to(dtype), work.t_B, captions, mask, return_dict=False)[0]
    return (out.float() - work.target_BCHW).square().mean()


class Ours:
    """This project."""

    packages: ClassVar[tuple[str, ...]] = ()

    def __init__(self, settings: Settings) -> None:
        self.model = our_model(settings).requires_grad_(False)
        targets = (p for p in linear_layers(self.model) if ".attention." in p or ".feed_forward." in p)
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
        targets = r".*\.(attn\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.linear_[123])"
        self.model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        for weight in self.trained:
            weight.data = weight.data.float()
        disturb(self.trained)

    def loss(self, work: Work) -> Tensor:
        """Forward."""
        return their_loss(self.model, work, self.dtype)


class Reference:
    """The reference tool's arithmetic; its captions are padded to 256 tokens."""

    packages: ClassVar[tuple[str, ...]] = ()

    def __init__(self, settings: Settings) -> None:
        self.dtype, self.device = settings.dtype, settings.device
        weights = dict(make_weights(settings.params, settings.device))
        with torch.device("meta"):
            model = ReferenceModel(settings.params, weights)
        self.model = model.to(settings.device, settings.dtype).requires_grad_(False)
        self.model.checkpointing = settings.checkpointing
        self.trained = [weight.requires_grad_() for weight in self.model.add_loras(RANK)]
        disturb(self.trained)

    def loss(self, work: Work) -> Tensor:
        """Forward."""
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=half):
            out = self.model(work.latents_BCHW.to(self.dtype), work.t_B, work.captions)
        return (out.float() - work.target_BCHW).square().mean()


def _for_diffusers(weights: dict[str, Tensor], params: NextDiTParams) -> dict[str, Tensor]:
    rows = [heads * params.head_dim for heads in (params.n_heads, params.n_kv_heads, params.n_kv_heads)]
    renamed = {}
    for name, weight in weights.items():
        names = diffusers_names(name)
        renamed |= zip(names, weight.split(rows) if len(names) == 3 else (weight,), strict=True)
    return renamed


def useful_flops(settings: Settings) -> float:
    """Floating-point operations of the products that a step needs, see benchmarks/step.py."""
    p, size = settings.params, settings.family.sizes[settings.size]
    matrices = p.dim * (p.qkv_dim + p.n_heads * p.head_dim + 3 * p.ffn_dim)
    image = (size.latent // p.patch_size) ** 2
    total = 0.0
    for index in range(settings.batch):
        text = size.caption - 7 * (index % 3)
        for blocks, tokens in (
            (p.n_layers, text + image),
            (p.n_noise_refiners, image),
            (p.n_context_refiners, text),
        ):
            linear = 2 * 2 * tokens * matrices  # forward, and backward to the input
            attention = 3 * 4 * tokens**2 * p.n_heads * p.head_dim  # forward, and twice that backward
            total += blocks * (linear + attention)
            if settings.checkpointing:
                total += blocks * (linear / 2 + attention / 3)
    return total


def tokens(settings: Settings) -> int:
    """Tokens of a batch."""
    size = settings.family.sizes[settings.size]
    captions = sum(size.caption - 7 * (index % 3) for index in range(settings.batch))
    return settings.batch * (size.latent // settings.params.patch_size) ** 2 + captions


LUMINA = Family(
    "lumina",
    SIZES,
    {"ours": Ours, "diffusers": Rival, "reference": Reference},
    make_work,
    useful_flops,
    tokens,
)
