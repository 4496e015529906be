"""Lumina Image 2.0 computed as the reference tool (sd-scripts) computes it, in plain torch, for comparison.

Written from a description of its arithmetic, not from its code. What costs it time and memory is kept:

- captions are padded to 256 tokens and refined so; then caption and image of a sample are joined and padded
- attention always gets a boolean mask, expanded over heads and queries; keys and values are repeated
- the rotary embedding is complex128, and so are queries and keys while they are turned
- RMS norms are separate operations in fp32; every modulation and gate is an operation of its own
- a LoRA multiplies its full-width output twice, by the multiplier and by alpha / rank
- weights and activations are half precision under autocast
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.lumina2_format import NextDiTParams

PADDED = 256  # tokens of every caption


class Norm(nn.Module):
    """RMSNorm in pieces."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.type_as(x) * self.weight


class LoRA(nn.Module):
    """A linear layer with a LoRA beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base, self.multiplier, self.scale = base, 1.0, 1.0
        self.down = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.up = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.base(x) + self.up(self.down(x)) * self.multiplier * self.scale


class Attention(nn.Module):
    """Joint attention."""

    def __init__(self, p: NextDiTParams) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = p.n_heads, p.n_kv_heads, p.head_dim
        self.qkv = nn.Linear(p.dim, p.qkv_dim, bias=False)
        self.out = nn.Linear(p.n_heads * p.head_dim, p.dim, bias=False)
        self.q_norm, self.k_norm = Norm(p.head_dim, p.qk_norm_eps), Norm(p.head_dim, p.qk_norm_eps)

    def forward(self, x: Tensor, mask: Tensor, turns: Tensor) -> Tensor:
        """x (B, S, D), mask (B, S), turns (B, S, P) complex."""
        batch, tokens, _ = x.shape
        sizes = [self.heads * self.head_dim, *[self.kv_heads * self.head_dim] * 2]
        q, k, v = (part.view(batch, tokens, -1, self.head_dim) for part in self.qkv(x).split(sizes, -1))
        dtype = q.dtype
        q, k = _turn(self.q_norm(q), turns).to(dtype), _turn(self.k_norm(k), turns).to(dtype)
        repeats = self.heads // self.kv_heads
        k, v = (part.unsqueeze(3).repeat(1, 1, 1, repeats, 1).flatten(2, 3) for part in (k, v))
        mask = mask.bool().view(batch, 1, 1, tokens).expand(-1, self.heads, tokens, -1)
        mixed = F.scaled_dot_product_attention(*(part.permute(0, 2, 1, 3) for part in (q, k, v)), mask)
        return self.out(mixed.permute(0, 2, 1, 3).flatten(2).to(dtype))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, p: NextDiTParams) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(p.dim, p.ffn_dim, bias=False) for _ in range(2))
        self.w2 = nn.Linear(p.ffn_dim, p.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """A block between sandwich norms."""

    def __init__(self, p: NextDiTParams, modulated: bool) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(p), FeedForward(p)
        for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            self.add_module(name, Norm(p.dim, p.norm_eps))
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(p.time_dim, 4 * p.dim))

    def forward(self, x: Tensor, mask: Tensor, turns: Tensor, time: Tensor | None = None) -> Tensor:
        """x (B, S, D)."""
        if time is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), mask, turns))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        scale_1, gate_1, scale_2, gate_2 = self.adaLN_modulation(time).unsqueeze(1).chunk(4, -1)
        inner = self.attention(self.attention_norm1(x) * (1 + scale_1), mask, turns)
        x = x + gate_1.tanh() * self.attention_norm2(inner)
        return x + gate_2.tanh() * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * (1 + scale_2)))


class ReferenceModel(nn.Module):
    """The network, with weights under their original names. All images of a batch have one size."""

    def __init__(self, p: NextDiTParams, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.p, self.checkpointing = p, False
        self.x_embedder = nn.Linear(p.patch_dim, p.dim)
        self.t_embedder = nn.Module()
        middle = nn.SiLU()
        self.t_embedder.mlp = nn.Sequential(
            nn.Linear(p.time_frequencies, p.time_dim), middle, nn.Linear(p.time_dim, p.time_dim)
        )
        self.cap_embedder = nn.Sequential(Norm(p.cap_feat_dim, p.norm_eps), nn.Linear(p.cap_feat_dim, p.dim))
        self.noise_refiner = nn.ModuleList(Block(p, True) for _ in range(p.n_noise_refiners))
        self.context_refiner = nn.ModuleList(Block(p, False) for _ in range(p.n_context_refiners))
        self.layers = nn.ModuleList(Block(p, True) for _ in range(p.n_layers))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(p.dim, p.patch_dim)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(p.time_dim, p.dim))
        own = {name: tensor for name, tensor in weights.items() if "norm_final" not in name}
        self.load_state_dict(own, assign=True)  # what was built may be on the meta device
        self.tables = [  # of every axis, for positions 0 to 299, as complex128
            torch.polar(torch.ones_like(angles), angles)
            for angles in (_angles(dim, p.rope_theta) for dim in p.axes_dims)
        ]

    def add_loras(self, rank: int) -> list[nn.Parameter]:
        """Put a LoRA on attention and feed-forward of every block; return what is trained."""
        trained = []
        for block in (*self.noise_refiner, *self.context_refiner, *self.layers):
            for parent, name in (
                *((block.attention, name) for name in ("qkv", "out")),
                *((block.feed_forward, name) for name in ("w1", "w2", "w3")),
            ):
                lora = LoRA(getattr(parent, name), rank)
                setattr(parent, name, lora)
                trained += [lora.down.weight, lora.up.weight]
        return trained

    def forward(self, x: Tensor, t: Tensor, captions: Sequence[Tensor]) -> Tensor:
        """x (B, C, h, w), t (B,), captions (L, D) each -> x0 - noise (B, C, h, w)."""
        p, batch, device = self.p, len(x), x.device
        rows, columns = x.shape[2] // p.patch_size, x.shape[3] // p.patch_size
        image_tokens, lengths = rows * columns, [len(caption) for caption in captions]
        time = self.t_embedder.mlp(_sinusoid(t, p.time_frequencies))
        padded = torch.zeros(batch, PADDED, captions[0].shape[1], dtype=captions[0].dtype, device=device)
        text_mask = torch.zeros(batch, PADDED, dtype=torch.bool, device=device)
        for row, caption in enumerate(captions):
            padded[row, : len(caption)], text_mask[row, : len(caption)] = caption, True
        longest = max(lengths) + image_tokens
        turns = torch.stack([self._turns(length, rows, columns, longest, device) for length in lengths])
        text = self._refine(self.cap_embedder(padded), text_mask, turns, lengths)
        image = self.x_embedder(_patches(x, p.patch_size))
        image_turns = torch.stack([turns[i, n : n + image_tokens] for i, n in enumerate(lengths)])
        everything = torch.ones(batch, image_tokens, dtype=torch.bool, device=device)
        for block in self.noise_refiner:
            image = self._run(block, image, everything, image_turns, time)
        joint = torch.zeros(batch, longest, p.dim, dtype=image.dtype, device=device)
        mask = torch.zeros(batch, longest, dtype=torch.bool, device=device)
        for row, length in enumerate(lengths):
            joint[row, :length], mask[row, : length + image_tokens] = text[row, :length].to(joint.dtype), True
            joint[row, length : length + image_tokens] = image[row]
        for block in self.layers:
            joint = self._run(block, joint, mask, turns, time)
        scale = 1 + self.final_layer.adaLN_modulation(time).unsqueeze(1)
        out = self.final_layer.linear(F.layer_norm(joint, joint.shape[-1:], eps=1e-6) * scale)
        images = torch.stack([out[i, n : n + image_tokens] for i, n in enumerate(lengths)])
        images = images.view(batch, rows, columns, p.patch_size, p.patch_size, -1)
        return images.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def _refine(self, text: Tensor, mask: Tensor, turns: Tensor, lengths: Sequence[int]) -> Tensor:
        own = torch.ones(len(text), PADDED, turns.shape[-1], dtype=turns.dtype, device=turns.device)
        for row, length in enumerate(lengths):
            own[row, :length] = turns[row, :length]
        for block in self.context_refiner:
            text = self._run(block, text, mask, own, None)
        return text

    def _run(self, block: Block, *inputs: Tensor | None) -> Tensor:
        if not self.checkpointing:
            return block(*inputs)
        return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)

    def _turns(self, length: int, rows: int, columns: int, longest: int, device: torch.device) -> Tensor:
        """Turns of the pairs of each token, made anew in every step."""
        positions = torch.zeros(longest, 3, dtype=torch.int64)
        positions[:length, 0] = torch.arange(length)
        positions[length : length + rows * columns, 0] = length
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        positions[length : length + rows * columns, 1:] = grid
        parts = [table[positions[:, axis]] for axis, table in enumerate(self.tables)]
        return torch.cat(parts, -1).to(device)


def _turn(x: Tensor, turns: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns.unsqueeze(2)).flatten(3).type_as(x)


def _angles(dim: int, theta: float) -> Tensor:
    place = {"dtype": torch.float64, "device": "cpu"}
    frequencies = theta ** -(torch.arange(0, dim, 2, **place) / dim)
    return torch.outer(torch.arange(300, **place), frequencies)


def _sinusoid(t: Tensor, frequencies: int) -> Tensor:
    half = frequencies // 2
    steps = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).to(t.device)
    angles = t[:, None].float() * steps
    return torch.cat((angles.cos(), angles.sin()), -1)


def _patches(x: Tensor, patch: int) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
