"""The transformer of Kandinsky 5.0 Image, for text-to-image and image-to-image.

Notable facts:
- The tokens of all samples lie end to end, (T, D), texts at their real length and pictures of any size: no
  padding, no mask. Texts and pictures are two sequences that are never joined.
- Texts go through blocks of self-attention and feed-forward, pictures through blocks that attend to the text
  in between. Both are modulated: every layer norm is scaled and shifted, and every branch gated, by the
  timestep and the pooled text. So texts must run in every step too.
- Positions are rotary: along the text, and over (time, row, column) of a picture, whose time is 0. Attention
  to the text knows no positions. There are tables for 1024 tokens of text and 128 patches along a side.
- A patch goes in with all channels of a pixel together, and comes out channel by channel.
- The time is 1000 sigma, and the output is noise - x0.
- Modules are named as in the original release, because LoRA files are named after them.

Precision, as in the official code: computed in fp32, whatever the dtype of the activations, are the time
embedding, modulation (whose weights may be kept in half precision), scaled and shifted norms, gates and their
sums, norms of queries and keys, and their rotation. The one difference: official code rounds rotated queries
and keys to bf16 even in fp32 runs, and in bf16 runs rounds them before rotation too. Here they are rounded
once, to the dtype of the activations, so an fp32 run is one; in bf16 both are equally far from it. With
`round_rotated` the network rounds as the official code does.

Code of the authors: https://github.com/kandinskylab/kandinsky-5.

Shape legend: T packed tokens (S of the texts, where pictures are meant too), B samples, D model features, E
features of the timestep, P of the pooled text, H heads, F features of a head; C channels, h and w height and
width of a latent, L tokens of one text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.models.kandinsky5_format import Kandinsky5Params, check_patches, check_text_length
from library.nn.activations import GELU
from library.nn.attention import attention
from library.nn.layers import RMSNorm, norm_and_rotate, official_norm_and_rotate, sinusoid
from library.nn.modulated import LayerNorm, Modulation, gated_residual, modulated_layer_norm
from library.nn.packing import Layout, Packing
from library.nn.patches import grid_of, to_patches
from library.nn.products import Fp32Linear, Linear
from library.nn.rope import ApartRopeTables
from library.nn.running.recompute import costly, slight
from library.nn.running.routing import Routing, run_blocks
from library.nn.running.runner import BlockRunner
from library.nn.together import activated, together
from library.nn.transformer import Transformer

_THETA = 10000.0
_LN_EPS = 1e-5
_QK_EPS = torch.finfo(torch.float32).eps  # the default of torch's RMSNorm for fp32


class TimeEmbeddings(nn.Module):
    """Sinusoid of the time, then a two-layer perceptron; all of it in fp32."""

    def __init__(self, params: Kandinsky5Params) -> None:
        super().__init__()
        self.width = params.model_dim
        self.in_layer = Fp32Linear(params.model_dim, params.time_dim)
        self.out_layer = Fp32Linear(params.time_dim, params.time_dim)

    def forward(self, time_B: Tensor) -> Tensor:
        """(B,), 0 to 1000 -> (B, E)."""
        return self.out_layer(F.silu(self.in_layer(sinusoid(time_B, self.width, _THETA))))


class TextEmbeddings(nn.Module):
    """A linear layer and a layer norm."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.in_layer = Linear(text_dim, dim)
        self.norm = LayerNorm(dim, _LN_EPS)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """Rows of text features -> rows of model features."""
        return self.norm(self.in_layer(x.to(self.norm.weight.dtype)), packing)


class VisualEmbeddings(nn.Module):
    """A linear layer from patches."""

    def __init__(self, params: Kandinsky5Params) -> None:
        super().__init__()
        self.in_layer = Linear(params.patch_size**2 * params.in_channels, params.model_dim)

    def forward(self, patches: Tensor) -> Tensor:
        """(T, numbers of a patch) -> (T, D)."""
        return self.in_layer(patches)


class Attention(nn.Module):
    """Attention of one sequence to itself or to another, with normalised queries and keys."""

    def __init__(self, params: Kandinsky5Params) -> None:
        super().__init__()
        self.head_dim = params.head_dim
        self.kernel = "auto"
        self.round_rotated = False
        self.to_query = Linear(params.model_dim, params.model_dim)
        self.to_key = Linear(params.model_dim, params.model_dim)
        self.to_value = Linear(params.model_dim, params.model_dim)
        self.query_norm = RMSNorm(params.head_dim, _QK_EPS)
        self.key_norm = RMSNorm(params.head_dim, _QK_EPS)
        self.out_layer = Linear(params.model_dim, params.model_dim)

    def project(self, x_TD: Tensor, rope_TP2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, D) -> queries, keys and values of attention to itself, (T, H, F) each."""
        q_TD, k_TD, v_TD = costly(together, x_TD, self.to_query, self.to_key, self.to_value)
        queries = self._normed(q_TD, self.query_norm, rope_TP2)
        return queries, self._normed(k_TD, self.key_norm, rope_TP2), self._heads(v_TD)

    def project_to(self, x_TD: Tensor, others_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, D), (S, D) -> queries (T, H, F), and keys and values (S, H, F) of what is attended to."""
        q_TD = costly(self.to_query, x_TD)
        k_SD, v_SD = costly(together, others_SD, self.to_key, self.to_value)
        queries = self._normed(q_TD, self.query_norm, None)
        return queries, self._normed(k_SD, self.key_norm, None), self._heads(v_SD)

    def attend(self, qkv: Sequence[Tensor], packing: Packing, keys: Packing | None = None) -> Tensor:
        """Let the tokens of each sample attend to its keys, (T, D)."""
        attended = partial(attention, packing=packing, kernel=self.kernel, keys=keys)
        return attended(*qkv) if keys is None else slight(attended, *qkv)

    def _heads(self, x_TD: Tensor) -> Tensor:
        return x_TD.unflatten(1, (-1, self.head_dim))

    def _normed(self, x_TD: Tensor, norm: RMSNorm, rope_TP2: Tensor | None) -> Tensor:
        x_THF = self._heads(x_TD)
        gain_HF = norm.gain().expand(x_THF.shape[1], -1)
        function = official_norm_and_rotate if self.round_rotated else norm_and_rotate
        return function(x_THF, gain_HF, rope_TP2, norm.eps)


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, params: Kandinsky5Params) -> None:
        super().__init__()
        self.in_layer = Linear(params.model_dim, params.ff_dim, bias=False)
        self.out_layer = Linear(params.ff_dim, params.model_dim, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return activated(GELU, (costly(self.in_layer, x_TD, wide=True),), self.out_layer)


class TextBlock(nn.Module):
    """Self-attention and feed-forward of a text.

    What lies between the attentions are functions of their own, here and in `VisualBlock`, because each can
    be compiled whole: they do not depend on where samples end, while attention does, and is a kernel already.
    """

    compiled_parts = ("before_attention", "after_attention")

    def __init__(self, params: Kandinsky5Params) -> None:
        super().__init__()
        self.text_modulation = Modulation(params.time_dim, params.model_dim, 6)
        self.self_attention = Attention(params)
        self.feed_forward = FeedForward(params)

    def forward(self, x_TD: Tensor, layout: Layout, time_BE: Tensor) -> Tensor:
        """(T, D) -> (T, D). `time_BE`: silu of the time embedding, fp32."""
        qkv, others = self.before_attention(x_TD, layout.packing, layout.rope_TP2, time_BE)
        mixed_TD = self.self_attention.attend(qkv, layout.packing)
        return self.after_attention(x_TD, mixed_TD, others, layout.packing)

    def before_attention(
        self, x_TD: Tensor, packing: Packing, rope_TP2: Tensor, time_BE: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return queries, keys and values, and what modulates the rest of the block."""
        shift_BD, scale_BD, *others = self.text_modulation(time_BE)
        return _self_attention(self.self_attention, x_TD, shift_BD, scale_BD, packing, rope_TP2), (*others,)

    def after_attention(
        self, x_TD: Tensor, mixed_TD: Tensor, others: Sequence[Tensor], packing: Packing
    ) -> Tensor:
        """Return the block's output from its input and from what attention made of it."""
        gate_BD, *of_feed_forward = others
        x_TD = gated_residual(x_TD, costly(self.self_attention.out_layer, mixed_TD), gate_BD, packing)
        return _plus_feed_forward(self.feed_forward, x_TD, of_feed_forward, packing)


class VisualBlock(nn.Module):
    """Self-attention of a picture, attention to its text, and feed-forward."""

    compiled_parts = ("before_attention", "between_attentions", "after_attentions")

    def __init__(self, params: Kandinsky5Params) -> None:
        super().__init__()
        self.visual_modulation = Modulation(params.time_dim, params.model_dim, 9)
        self.self_attention = Attention(params)
        self.cross_attention = Attention(params)
        self.feed_forward = FeedForward(params)

    def forward(
        self, x_TD: Tensor, layout: Layout, text_SD: Tensor, text: Packing, time_BE: Tensor
    ) -> Tensor:
        """(T, D) -> (T, D). `time_BE`: silu of the time embedding, fp32."""
        qkv, others = self.before_attention(x_TD, layout.packing, layout.rope_TP2, time_BE)
        mixed_TD = self.self_attention.attend(qkv, layout.packing)
        x_TD, qkv = self.between_attentions(x_TD, mixed_TD, text_SD, others[:3], layout.packing)
        mixed_TD = self.cross_attention.attend(qkv, layout.packing, text)
        return self.after_attentions(x_TD, mixed_TD, others[3:], layout.packing)

    def before_attention(
        self, x_TD: Tensor, packing: Packing, rope_TP2: Tensor, time_BE: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return queries, keys and values, and what modulates the rest of the block."""
        shift_BD, scale_BD, *others = self.visual_modulation(time_BE)
        return _self_attention(self.self_attention, x_TD, shift_BD, scale_BD, packing, rope_TP2), (*others,)

    def between_attentions(
        self, x_TD: Tensor, mixed_TD: Tensor, text_SD: Tensor, others: Sequence[Tensor], packing: Packing
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the residual stream, and queries, keys and values of the attention to the text."""
        gate_BD, shift_BD, scale_BD = others
        x_TD = gated_residual(x_TD, costly(self.self_attention.out_layer, mixed_TD), gate_BD, packing)
        inner_TD = modulated_layer_norm(x_TD, 1 + scale_BD, shift_BD, packing, _LN_EPS)
        return x_TD, self.cross_attention.project_to(inner_TD, text_SD)

    def after_attentions(
        self, x_TD: Tensor, mixed_TD: Tensor, others: Sequence[Tensor], packing: Packing
    ) -> Tensor:
        """Return the block's output from the residual stream and from what was found in the text."""
        gate_BD, *of_feed_forward = others
        x_TD = gated_residual(x_TD, costly(self.cross_attention.out_layer, mixed_TD), gate_BD, packing)
        return _plus_feed_forward(self.feed_forward, x_TD, of_feed_forward, packing)


def _self_attention(
    layers: Attention, x_TD: Tensor, shift_BD: Tensor, scale_BD: Tensor, packing: Packing, rope_TP2: Tensor
) -> tuple[Tensor, ...]:
    """Return queries, keys and values of the normalised stream."""
    inner_TD = modulated_layer_norm(x_TD, 1 + scale_BD, shift_BD, packing, _LN_EPS)
    return layers.project(inner_TD, rope_TP2)


def _plus_feed_forward(
    layers: FeedForward, x_TD: Tensor, modulation: Sequence[Tensor], packing: Packing
) -> Tensor:
    """Return the stream plus the gated feed-forward of its norm. `modulation`: shift, scale, gate."""
    shift_BD, scale_BD, gate_BD = modulation
    inner_TD = modulated_layer_norm(x_TD, 1 + scale_BD, shift_BD, packing, _LN_EPS)
    return gated_residual(x_TD, layers(inner_TD), gate_BD, packing)


class OutLayer(nn.Module):
    """A modulated layer norm, then the projection to patches."""

    def __init__(self, params: Kandinsky5Params) -> None:
        super().__init__()
        self.modulation = Modulation(params.time_dim, params.model_dim, 2)
        self.out_layer = Linear(params.model_dim, params.patch_size**2 * params.latent_channels)

    def forward(self, x_TD: Tensor, packing: Packing, time_BE: Tensor) -> Tensor:
        """(T, D) -> (T, numbers of a patch)."""
        shift_BD, scale_BD = self.modulation(time_BE)
        return self.out_layer(modulated_layer_norm(x_TD, 1 + scale_BD, shift_BD, packing, _LN_EPS))


class Kandinsky5DiT(Transformer):
    """The network; see the module's docstring. `runner` says how its blocks are run."""

    def __init__(self, params: Kandinsky5Params) -> None:
        super().__init__()
        self.params = params
        self.rope = ApartRopeTables(params.axes_dims, _THETA)
        self.time_embeddings = TimeEmbeddings(params)
        self.text_embeddings = TextEmbeddings(params.text_dim, params.model_dim)
        self.pooled_text_embeddings = TextEmbeddings(params.pooled_dim, params.time_dim)
        self.visual_embeddings = VisualEmbeddings(params)
        self.text_transformer_blocks = nn.ModuleList(TextBlock(params) for _ in range(params.n_text_blocks))
        self.visual_transformer_blocks = nn.ModuleList(
            VisualBlock(params) for _ in range(params.n_visual_blocks)
        )
        self.out_layer = OutLayer(params)
        self.runner = BlockRunner(
            itertools.chain(self.text_transformer_blocks, self.visual_transformer_blocks)
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations and of all weights but the time embedding's."""
        return self.text_embeddings.norm.weight.dtype

    @property
    def round_rotated(self) -> bool:
        """Whether rotated queries and keys are rounded to bf16 in any dtype; see the module's docstring."""
        return next(iter(self._attentions())).round_rotated

    @round_rotated.setter
    def round_rotated(self, value: bool) -> None:
        for layer in self._attentions():
            layer.round_rotated = value

    def use_attention(self, kernel: str) -> None:
        """Let every block use the named kernel of `library.nn.attention`."""
        for layer in self._attentions():
            layer.kernel = kernel

    @property
    def routed_blocks(self) -> nn.ModuleList:
        """Those of the pictures."""
        return self.visual_transformer_blocks

    def block_flops(self, seen: Sequence[int], image: int, text: int) -> int:
        """Count the products of all blocks."""
        p = self.params
        square, feed_forward = p.model_dim**2, 2 * p.model_dim * p.ff_dim

        def block(tokens: int) -> int:
            linear = tokens * (6 * square + feed_forward) + text * 2 * square
            return 2 * linear + 4 * tokens * (tokens + text) * p.model_dim

        of_text = 2 * text * (4 * square + feed_forward) + 4 * text**2 * p.model_dim
        return p.n_text_blocks * of_text + sum(map(block, seen))

    def forward(
        self,
        x: Sequence[Tensor],
        time_B: Tensor,
        tokens: Sequence[Tensor],
        pooled_BP: Tensor,
        routing: Routing | None = None,
    ) -> list[Tensor]:
        """Predict noise - x0.

        Args:
            x: what a picture is made from, (C, h, w) a sample: noisy latents; for image-to-image followed by
                source latents and a mask. Sizes may differ and are multiples of the patch size.
            time_B: 1000 sigma: 0 for image .. 1000 for noise, fp32.
            tokens: text features, (L, text_dim) a sample.
            pooled_BP: pooled text features.
            routing: which tokens skip which visual blocks, in training; None: all go through all of them.

        Returns:
            (C, h, w) a sample, in the model's dtype.

        Raises:
            ConfigError: a text or a picture that is larger than the model has positions for.
            ValueError: latents that do not fit, or a text without a token, which nothing can attend to.
        """
        patch, channels = self.params.patch_size, self.params.in_channels
        grids = [grid_of(sample, patch, channels) for sample in x]
        text, visual = self._layouts([len(features) for features in tokens], grids, x[0].device)
        time_BE = self._time(time_B, pooled_BP)
        text_TD = self.text_embeddings(torch.cat(list(tokens)), text.packing)
        for block in self.text_transformer_blocks:
            text_TD = self.runner.run(block, text_TD, text, time_BE)
        patches = torch.cat([to_patches(sample, patch) for sample in x])
        x_TD = self.visual_embeddings(patches.to(self.dtype))

        def run(block: nn.Module, x_TD: Tensor, layout: Layout) -> Tensor:
            return self.runner.run(block, x_TD, layout, text_TD, text.packing, time_BE)

        x_TD = run_blocks(self.visual_transformer_blocks, x_TD, visual, run, routing)
        parts = visual.split(self.out_layer(x_TD, visual.packing, time_BE))
        return [self._unpatchify(part, grid) for part, grid in zip(parts, grids, strict=True)]

    def _time(self, time_B: Tensor, pooled_BP: Tensor) -> Tensor:
        """Return silu of the sum of time and pooled text, fp32 (B, E): modulation reads nothing else."""
        rows = Packing.of([len(pooled_BP)], pooled_BP.device)
        pooled_BE = self.pooled_text_embeddings(pooled_BP, rows)
        return F.silu(self.time_embeddings(time_B) + pooled_BE)

    def _layouts(
        self, lengths: Sequence[int], grids: Sequence[tuple[int, int]], device: torch.device
    ) -> tuple[Layout, Layout]:
        """Layouts of the texts and of the pictures."""
        if min(lengths) < 1:
            raise ValueError("a text has no tokens; even the features of an empty prompt have one")
        for length in lengths:
            check_text_length(length)
        for grid in grids:
            check_patches(*grid)
        areas = [rows * columns for rows, columns in grids]
        return (
            Layout.of(lengths, [self.rope.text(length, device) for length in lengths], device),
            Layout.of(areas, [self.rope.image(*grid, device) for grid in grids], device),
        )

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        patch, (rows, columns) = self.params.patch_size, grid
        return rearrange(patches, "(h w) (c p q) -> c (h p) (w q)", h=rows, w=columns, p=patch, q=patch)

    def _attentions(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]
