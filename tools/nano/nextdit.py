"""A small random NextDiT in the names and shapes of the original Lumina Image 2.0 file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from library.core.seeds import generator

NamedShape = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class NanoDiT:
    """Sizes of the network, in the proportions of the 2B model: grouped queries, three equal RoPE axes."""

    dim: int = 192
    layers: int = 4
    refiner_layers: int = 1
    heads: int = 4
    kv_heads: int = 2
    ffn_dim: int = 768
    caption_dim: int = 128
    patch_dim: int = 64  # 2 x 2 pixels of 16 latent channels
    frequency_dim: int = 256

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.heads

    @property
    def time_dim(self) -> int:
        """Width of the time embedding: the model width, capped at 1024 as in the original."""
        return min(self.dim, 1024)


def nextdit_tensors(seed: int, sizes: NanoDiT | None = None) -> dict[str, Tensor]:
    """Return the tensors by their original names, fp32 with values that bf16 holds exactly.

    Nothing is zero that a fresh network starts at zero (modulation, gates, final layer), so there is a
    gradient to every part and a test cannot pass because a branch is off.
    """
    return {name: _random(seed, name, shape) for name, shape in nextdit_shapes(sizes or NanoDiT())}


def nextdit_shapes(s: NanoDiT) -> Iterator[NamedShape]:
    """Yield every tensor name of the original single file with its shape."""
    yield from _linear("x_embedder", s.dim, s.patch_dim)
    yield from _linear("t_embedder.mlp.0", s.time_dim, s.frequency_dim)
    yield from _linear("t_embedder.mlp.2", s.time_dim, s.time_dim)
    yield "cap_embedder.0.weight", (s.caption_dim,)
    yield from _linear("cap_embedder.1", s.dim, s.caption_dim)
    for index in range(s.refiner_layers):
        yield from _block(f"noise_refiner.{index}", s, modulated=True)
        yield from _block(f"context_refiner.{index}", s, modulated=False)
    for index in range(s.layers):
        yield from _block(f"layers.{index}", s, modulated=True)
    yield "norm_final.weight", (s.dim,)
    yield from _linear("final_layer.linear", s.patch_dim, s.dim)
    yield from _linear("final_layer.adaLN_modulation.1", s.dim, s.time_dim)


def _block(name: str, s: NanoDiT, *, modulated: bool) -> Iterator[NamedShape]:
    yield f"{name}.attention.qkv.weight", ((s.heads + 2 * s.kv_heads) * s.head_dim, s.dim)
    yield f"{name}.attention.out.weight", (s.dim, s.dim)
    yield f"{name}.attention.q_norm.weight", (s.head_dim,)
    yield f"{name}.attention.k_norm.weight", (s.head_dim,)
    yield f"{name}.feed_forward.w1.weight", (s.ffn_dim, s.dim)
    yield f"{name}.feed_forward.w2.weight", (s.dim, s.ffn_dim)
    yield f"{name}.feed_forward.w3.weight", (s.ffn_dim, s.dim)
    for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield f"{name}.{norm}.weight", (s.dim,)
    if modulated:
        yield from _linear(f"{name}.adaLN_modulation.1", 4 * s.dim, s.time_dim)


def _linear(name: str, rows: int, columns: int) -> Iterator[NamedShape]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _random(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Keep activations O(1): matrices by 1/sqrt(fan in), norm weights near one, biases small."""
    noise = torch.randn(shape, generator=generator(seed, "nextdit", name))
    if len(shape) == 2:
        values = noise / shape[1] ** 0.5
    elif name.endswith(".bias"):
        values = 0.2 * noise
    else:
        values = 1.0 + 0.1 * noise
    return values.bfloat16().float()
