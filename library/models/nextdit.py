"""NextDiT, the transformer of Lumina Image 2.0.

Notable facts:
- The tokens of all samples lie end to end, (T, D): captions at their real length, images of any size. There
  is no padding and no mask; linear layers and norms see one long sequence, only attention knows where a
  sample ends.
- Captions and images are refined apart (`context_refiner`, `noise_refiner`), then joined: caption first,
  then image.
- Sandwich norms: RMS normalisation before and after attention and feed-forward. The timestep scales the
  first and, through tanh, gates the second; the context refiner knows no timestep.
- Queries and keys are normalised head by head; several query heads share one key/value head.
- Position is rotary over three axes: caption index, row, column. The caption index of an image's tokens is
  the length of its caption.
- Time runs from 0 (noise) to 1 (image) and the output is x0 - noise; `library.models.lumina2` translates.
- Modules are named as in the original release, because LoRA files are named after them.

Paper: https://arxiv.org/abs/2503.21758. Code of the authors: https://github.com/Alpha-VLLM/Lumina-Image-2.0.

Shape legend: T packed tokens, B samples, D model features, E features of the timestep, H query heads, K
key/value heads, S query, key and value heads together, F features of a head; C channels, h and w height and
width of a latent, L caption tokens of one sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.models.lumina2_format import NextDiTParams
from library.nn.activations import SWIGLU
from library.nn.attention import attention
from library.nn.layers import (
    RMSNorm,
    TimestepEmbedder,
    norm_and_rotate,
    normed_residual,
    scaled_rms_norm,
)
from library.nn.packing import Layout, Packing
from library.nn.patches import grid_of, to_patches
from library.nn.products import Linear
from library.nn.rope import RopeTables
from library.nn.running.recompute import costly
from library.nn.running.routing import Routing, run_blocks
from library.nn.running.runner import BlockRunner
from library.nn.together import activated, together
from library.nn.transformer import Transformer


class Attention(nn.Module):
    """Self-attention with normalised queries and keys, rotary positions and grouped queries."""

    def __init__(self, params: NextDiTParams) -> None:
        super().__init__()
        self.heads = (params.n_heads, params.n_kv_heads)
        self.head_dim = params.head_dim
        self.kernel = "auto"
        self.qkv = Linear(params.dim, (params.n_heads + 2 * params.n_kv_heads) * params.head_dim, bias=False)
        self.out = Linear(params.n_heads * params.head_dim, params.dim, bias=False)
        self.q_norm = RMSNorm(params.head_dim, params.qk_norm_eps)
        self.k_norm = RMSNorm(params.head_dim, params.qk_norm_eps)

    def project(self, x_TD: Tensor, rope_TP2: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) -> queries and keys, one behind the other (T, H + K, F), and values (T, K, F)."""
        heads, kv_heads = self.heads
        qkv_TSF = costly(self.qkv, x_TD).unflatten(1, (-1, self.head_dim))
        qk_TSF, v_TKF = qkv_TSF.split([heads + kv_heads, kv_heads], dim=1)
        gain_SF = torch.cat((self.q_norm.gain().expand(heads, -1), self.k_norm.gain().expand(kv_heads, -1)))
        return norm_and_rotate(qk_TSF, gain_SF, rope_TP2, self.q_norm.eps), v_TKF

    def attend(self, qk_TSF: Tensor, v_TKF: Tensor, packing: Packing) -> Tensor:
        """Let each sample's tokens attend to each other, (T, H * F)."""
        q_THF, k_TKF = qk_TSF.split(self.heads, dim=1)
        return attention(q_THF, k_TKF, v_TKF, packing, self.kernel)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden_dim, bias=False)
        self.w2 = Linear(hidden_dim, dim, bias=False)
        self.w3 = Linear(dim, hidden_dim, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return activated(SWIGLU, costly(together, x_TD, self.w1, self.w3, wide=True), self.w2)


class Block(nn.Module):
    """Attention and feed-forward between two norms each; if `modulated`, scaled and gated by time.

    What comes before attention and what comes after it are two functions, because each can be compiled whole:
    they do not depend on where samples end, while attention does, and is a kernel already.
    """

    compiled_parts = ("before_attention", "after_attention")

    def __init__(self, params: NextDiTParams, modulated: bool) -> None:
        super().__init__()
        self.attention = Attention(params)
        self.feed_forward = FeedForward(params.dim, params.ffn_dim)
        self.attention_norm1 = RMSNorm(params.dim, params.norm_eps)
        self.attention_norm2 = RMSNorm(params.dim, params.norm_eps)
        self.ffn_norm1 = RMSNorm(params.dim, params.norm_eps)
        self.ffn_norm2 = RMSNorm(params.dim, params.norm_eps)
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(params.time_dim, 4 * params.dim))
        else:
            self.adaLN_modulation = None

    def forward(self, x_TD: Tensor, layout: Layout, time_BE: Tensor | None = None) -> Tensor:
        """(T, D) -> (T, D)."""
        qk_TSF, v_TKF, gains = self.before_attention(x_TD, layout.packing, layout.rope_TP2, time_BE)
        mixed_TD = self.attention.attend(qk_TSF, v_TKF, layout.packing)
        return self.after_attention(x_TD, mixed_TD, gains, layout.packing)

    def before_attention(
        self, x_TD: Tensor, packing: Packing, rope_TP2: Tensor, time_BE: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return queries and keys, values, and the gains of the three norms that follow attention."""
        before, *others = self.gains(time_BE)
        inner_TD = scaled_rms_norm(x_TD, before, packing, self.attention_norm1.eps)
        return *self.attention.project(inner_TD, rope_TP2), others

    def after_attention(
        self, x_TD: Tensor, mixed_TD: Tensor, gains: Sequence[Tensor], packing: Packing
    ) -> Tensor:
        """Return the block's output from its input and from what attention made of it."""
        after_attention, before_ffn, after_ffn = gains
        eps = self.attention_norm1.eps
        x_TD = normed_residual(x_TD, costly(self.attention.out, mixed_TD), after_attention, packing, eps)
        inner_TD = self.feed_forward(scaled_rms_norm(x_TD, before_ffn, packing, eps))
        return normed_residual(x_TD, inner_TD, after_ffn, packing, eps)

    def gains(self, time_BE: Tensor | None) -> list[Tensor]:
        """Return what the four norms multiply by: fp32 (B, D), or (1, D) where the timestep has no say."""
        norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
        if self.adaLN_modulation is None:
            return [norm.gain() for norm in norms]
        scale_1, gate_1, scale_2, gate_2 = self.adaLN_modulation(time_BE).float().chunk(4, dim=1)
        factors_BD = (1 + scale_1, gate_1.tanh(), 1 + scale_2, gate_2.tanh())
        return [norm.gain(factor_BD) for norm, factor_BD in zip(norms, factors_BD, strict=True)]


class FinalLayer(nn.Module):
    """Layer norm scaled by the timestep, then the projection to patches."""

    def __init__(self, params: NextDiTParams) -> None:
        super().__init__()
        self.linear = Linear(params.dim, params.patch_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(params.time_dim, params.dim))

    def forward(self, parts: Iterable[Tensor], time_BE: Tensor) -> Tensor:
        """Samples of (tokens, D), one row of time each -> (T, patch features)."""
        scales_BD = 1 + self.adaLN_modulation(time_BE)
        normed = [F.layer_norm(x_TD, x_TD.shape[-1:], eps=1e-6) for x_TD in parts]
        return self.linear(
            torch.cat([x_TD * scale_D for x_TD, scale_D in zip(normed, scales_BD, strict=True)])
        )


class NextDiT(Transformer):
    """The network; see the module's docstring. `runner` says how its blocks are run."""

    def __init__(self, params: NextDiTParams) -> None:
        super().__init__()
        self.params = params
        self.rope = RopeTables(params.axes_dims, params.rope_theta)
        self.x_embedder = Linear(params.patch_dim, params.dim)
        self.t_embedder = TimestepEmbedder(params.time_dim, params.time_frequencies)
        self.cap_embedder = nn.Sequential(
            RMSNorm(params.cap_feat_dim, params.norm_eps), Linear(params.cap_feat_dim, params.dim)
        )
        self.noise_refiner = _blocks(params, params.n_noise_refiners, modulated=True)
        self.context_refiner = _blocks(params, params.n_context_refiners, modulated=False)
        self.layers = _blocks(params, params.n_layers, modulated=True)
        self.final_layer = FinalLayer(params)
        self.runner = BlockRunner(itertools.chain(self.context_refiner, self.noise_refiner, self.layers))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations and of all weights but the timestep embedder's."""
        return self.cap_embedder[0].weight.dtype

    def use_attention(self, kernel: str) -> None:
        """Let every block use the named kernel of `library.nn.attention`."""
        for block in self.runner.blocks:
            block.attention.kernel = kernel

    @property
    def routed_blocks(self) -> nn.ModuleList:
        """Those that captions and images go through together."""
        return self.layers

    def block_flops(self, seen: Sequence[int], image: int, text: int) -> int:
        """Count the products of all blocks; captions are never routed."""
        p = self.params
        weights = p.dim * p.qkv_dim + p.n_heads * p.head_dim * p.dim + 3 * p.dim * p.ffn_dim

        def block(tokens: int) -> int:
            return 2 * tokens * weights + 4 * tokens**2 * p.n_heads * p.head_dim

        refiners = p.n_context_refiners * block(text) + p.n_noise_refiners * block(image)
        return refiners + sum(block(text + tokens) for tokens in seen)

    def forward(
        self,
        x: Sequence[Tensor],
        t_B: Tensor,
        captions: Sequence[Tensor],
        routing: Routing | None = None,
    ) -> list[Tensor]:
        """Predict x0 - noise.

        Args:
            x: noisy latents, (C, h, w) a sample; sizes may differ and are multiples of the patch size.
            t_B: 0 for noise .. 1 for image, fp32.
            captions: text features, (L, cap_feat_dim) a sample.
            routing: which tokens skip which of `layers`, in training; None: all go through all of them.

        Returns:
            (C, h, w) a sample, in the model's dtype.
        """
        patch, channels = self.params.patch_size, self.params.in_channels
        grids = [grid_of(sample, patch, channels) for sample in x]
        text, image, joint = self._layouts([len(caption) for caption in captions], grids, x[0].device)
        time_BE = self.t_embedder(t_B).to(self.dtype)
        text_TD = self._run(self.context_refiner, self._embed_captions(captions, text.packing), text)
        image_TD = self._run(self.noise_refiner, self._embed_images(x), image, time_BE)
        pairs = zip(text.split(text_TD), image.split(image_TD), strict=True)
        x_TD = torch.cat([tokens for pair in pairs for tokens in pair])
        x_TD = self._run(self.layers, x_TD, joint, time_BE, routing, always=text.packing.lengths)
        pairs = zip(joint.split(x_TD), text.packing.lengths, strict=True)
        patches = image.split(self.final_layer([tokens[length:] for tokens, length in pairs], time_BE))
        return [self._unpatchify(tokens, grid) for tokens, grid in zip(patches, grids, strict=True)]

    def _layouts(
        self, text_lengths: Sequence[int], grids: Sequence[tuple[int, int]], device: torch.device
    ) -> tuple[Layout, Layout, Layout]:
        """Layouts of the captions alone, the images alone, and each caption followed by its image."""
        image_lengths = [rows * columns for rows, columns in grids]
        joint_lengths = [text + image for text, image in zip(text_lengths, image_lengths, strict=True)]
        ropes = [
            self.rope.sample(length, *grid, device) for length, grid in zip(text_lengths, grids, strict=True)
        ]
        text_ropes = [rope[:length] for rope, length in zip(ropes, text_lengths, strict=True)]
        image_ropes = [rope[length:] for rope, length in zip(ropes, text_lengths, strict=True)]
        return (
            Layout.of(text_lengths, text_ropes, device),
            Layout.of(image_lengths, image_ropes, device),
            Layout.of(joint_lengths, ropes, device),
        )

    def _embed_captions(self, captions: Sequence[Tensor], packing: Packing) -> Tensor:
        norm, linear = self.cap_embedder
        features_TD = torch.cat([caption.to(self.dtype) for caption in captions])
        return linear(scaled_rms_norm(features_TD, norm.gain(), packing, norm.eps))

    def _embed_images(self, x: Sequence[Tensor]) -> Tensor:
        patches = [to_patches(x_Chw, self.params.patch_size) for x_Chw in x]
        return self.x_embedder(torch.cat(patches).to(self.dtype))

    def _unpatchify(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        patch, (rows, columns) = self.params.patch_size, grid
        return rearrange(tokens, "(h w) (p q c) -> c (h p) (w q)", h=rows, w=columns, p=patch, q=patch)

    def _run(
        self,
        blocks: nn.ModuleList,
        x_TD: Tensor,
        layout: Layout,
        time_BE: Tensor | None = None,
        routing: Routing | None = None,
        *,
        always: Sequence[int] | None = None,
    ) -> Tensor:
        def run(block: nn.Module, x_TD: Tensor, layout: Layout) -> Tensor:
            return self.runner.run(block, x_TD, layout, time_BE)

        return run_blocks(blocks, x_TD, layout, run, routing, always=always)


def _blocks(params: NextDiTParams, count: int, modulated: bool) -> nn.ModuleList:
    return nn.ModuleList(Block(params, modulated) for _ in range(count))
