"""A stand-in with the module names of Lumina's NextDiT, made of small linear layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

WIDTH, QUERY, KEY, HIDDEN = 12, 12, 4, 32


class Block(nn.Module):
    """Attention-less: the linear layers of a block, one after the other."""

    def __init__(self, modulated: bool) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {
                "qkv": nn.Linear(WIDTH, QUERY + 2 * KEY, bias=False),
                "out": nn.Linear(QUERY, WIDTH, bias=False),
            }
        )
        self.feed_forward = nn.ModuleDict(
            {
                "w1": nn.Linear(WIDTH, HIDDEN, bias=False),
                "w2": nn.Linear(HIDDEN, WIDTH, bias=False),
                "w3": nn.Linear(WIDTH, HIDDEN, bias=False),
            }
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, WIDTH)) if modulated else None

    def forward(self, x_LD: Tensor, t_D: Tensor) -> Tensor:
        if self.adaLN_modulation is not None:
            x_LD = x_LD * (1 + self.adaLN_modulation(t_D[None]))
        q, k, v = torch.tanh(self.attention["qkv"](x_LD)).split([QUERY, KEY, KEY], dim=-1)
        x_LD = x_LD + self.attention["out"](q * k.sum(-1, keepdim=True) + v.sum(-1, keepdim=True))
        mlp = self.feed_forward
        return x_LD + mlp["w2"](torch.sigmoid(mlp["w1"](x_LD)) * mlp["w3"](x_LD))


class FinalLayer(nn.ModuleDict):
    """By this name LyCORIS knows the last layers."""


class StandIn(nn.Module):
    """tokens (L, 12) and captions (M, 12) -> (L, 4)."""

    def __init__(self, layers: int, refiners: int) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(WIDTH, WIDTH)
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))}
        )
        self.cap_embedder = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
        self.noise_refiner = nn.ModuleList(Block(True) for _ in range(refiners))
        self.context_refiner = nn.ModuleList(Block(False) for _ in range(refiners))
        self.layers = nn.ModuleList(Block(True) for _ in range(layers))
        self.final_layer = FinalLayer(
            {
                "linear": nn.Linear(WIDTH, 4),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, WIDTH)),
            }
        )

    def forward(self, x_LD: Tensor, t_D: Tensor, caption_MD: Tensor) -> Tensor:
        t_D = self.t_embedder["mlp"](t_D[None])[0]
        x_LD, caption_MD = self.x_embedder(x_LD), self.cap_embedder(caption_MD)
        for block in self.noise_refiner:
            x_LD = block(x_LD, t_D)
        for block in self.context_refiner:
            caption_MD = block(caption_MD, t_D)
        packed_LD = torch.cat([caption_MD, x_LD])
        for block in self.layers:
            packed_LD = block(packed_LD, t_D)
        image_LD = packed_LD[len(caption_MD) :] * (1 + self.final_layer["adaLN_modulation"](t_D[None]))
        return self.final_layer["linear"](image_LD)


@pytest.fixture
def lumina_like() -> Callable[..., StandIn]:
    """Return a maker of stand-ins with fixed weights; the 2B model has 26 layers and 2 + 2 refiners."""

    def make(layers: int = 2, refiners: int = 1) -> StandIn:
        torch.manual_seed(0)
        return StandIn(layers, refiners).requires_grad_(False).eval()

    return make


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a stand-in."""
    random = torch.Generator().manual_seed(1)
    return tuple(torch.randn(size, generator=random) for size in ((9, WIDTH), (WIDTH,), (5, WIDTH)))


@pytest.fixture
def sizes_of() -> Callable[..., dict[str, object]]:
    """Return a function that gives every linear layer of a model a LoRA of one size."""
    from networks.lora import LoRASize, linear_layers

    def make(model: nn.Module, rank: int = 3, alpha: float = 2.0) -> dict[str, object]:
        return dict.fromkeys(linear_layers(model), LoRASize(rank, alpha))

    return make


@pytest.fixture
def randomise() -> Callable[[nn.Module], None]:
    """Return a function that gives a network the weights of a trained one: no zero among them."""

    def fill(network: nn.Module, seed: int = 3) -> None:
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)

    return fill
