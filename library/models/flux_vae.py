"""The FLUX autoencoder: pictures to 16-channel latents of an eighth of the size, and back.

A convolutional autoencoder (black-forest-labs/flux, `modules/autoencoder.py`, after Stable Diffusion's):
residual blocks at four resolutions and one attention in the middle. Parameters are named as in the original.

Encoding returns the posterior's mean: it is the best estimate of the picture, the same in every run, and what
the official Lumina fine-tuning uses; a sample would add noise that a cache then freezes.

B batch, C channels, H height, W width, N = H*W.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.models.flux_vae_format import FluxVAECheckpoint, FluxVAEParams, inspect_flux_vae
from library.nn.products import Conv2d
from library.nn.tiling import map_tiles
from library.nn.weights.loading import Source, load_module

_EPS = 1e-6


class FluxVAE(nn.Module):
    """The autoencoder; latents in and out are already scaled: `(mean - shift) * scale`."""

    def __init__(self, params: FluxVAEParams) -> None:
        super().__init__()
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)
        self.scale, self.shift = params.scale, params.shift
        self.stride, self.latent_channels = params.stride, params.latent_channels

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and activations."""
        return self.decoder.conv_in.weight.dtype

    @torch.no_grad()
    def encode_mean(self, pixels_BCHW: Tensor) -> Tensor:
        """Encode pixels in [-1, 1], sizes divisible by `stride`; return scaled latents in fp32."""
        moments_BCHW = self.encoder(self._prepared(pixels_BCHW))
        mean_BCHW = moments_BCHW[:, : self.latent_channels].float()
        return (mean_BCHW - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Decode scaled latents to fp32 pixels in about [-1, 1]; clamping is left to the caller."""
        unscaled_BCHW = latents_BCHW.float() / self.scale + self.shift
        return self.decoder(self._prepared(unscaled_BCHW)).float()

    def decode_tiled(self, latents_BCHW: Tensor, tile: int = 192, overlap: int = 24) -> Tensor:
        """Decode in tiles of `tile` latents that blend over `overlap`: large pictures in bounded memory.

        By default a picture of up to 1536 pixels a side is one tile. What fits in one tile comes out
        exactly as from `decode`; larger pictures differ slightly, because each tile has group norm
        statistics and attention of its own.
        """
        return map_tiles(self.decode, latents_BCHW, tile=tile, overlap=overlap, stride=self.stride)

    def _prepared(self, x_BCHW: Tensor) -> Tensor:
        """Move to the weights' device, dtype and memory format."""
        device = self.decoder.conv_in.weight.device
        return x_BCHW.to(device=device, dtype=self.dtype, memory_format=_memory_format(device))


class Encoder(nn.Module):
    """Pixels to the mean and log variance of the posterior."""

    def __init__(self, params: FluxVAEParams) -> None:
        super().__init__()
        width, top = params.channels[0], params.channels[-1]
        self.conv_in = Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList()
        for level, channels in enumerate(params.channels):
            stage = nn.Module()
            stage.block = _residuals(params.blocks, width, channels, params.groups)
            stage.downsample = Downsample(channels) if level < params.levels - 1 else nn.Identity()
            self.down.append(stage)
            width = channels
        self.mid = Middle(top, params.groups)
        self.norm_out = nn.GroupNorm(params.groups, top, eps=_EPS)
        self.conv_out = Conv2d(top, 2 * params.latent_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return (B, 2 * latent channels, H / stride, W / stride)."""
        h_BCHW = self.conv_in(x_BCHW)
        for stage in self.down:
            h_BCHW = stage.downsample(stage.block(h_BCHW))
        h_BCHW = self.mid(h_BCHW)
        return self.conv_out(F.silu(self.norm_out(h_BCHW)))


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, params: FluxVAEParams) -> None:
        super().__init__()
        width = params.channels[-1]
        self.conv_in = Conv2d(params.latent_channels, width, 3, padding=1)
        self.mid = Middle(width, params.groups)
        stages = []
        for level in reversed(range(params.levels)):
            channels = params.channels[level]
            stage = nn.Module()
            stage.block = _residuals(params.blocks + 1, width, channels, params.groups)
            stage.upsample = Upsample(channels) if level > 0 else nn.Identity()
            stages.append(stage)
            width = channels
        self.up = nn.ModuleList(reversed(stages))  # numbered from the finest, as in the encoder
        self.norm_out = nn.GroupNorm(params.groups, width, eps=_EPS)
        self.conv_out = Conv2d(width, 3, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """Return (B, 3, H * stride, W * stride)."""
        h_BCHW = self.mid(self.conv_in(z_BCHW))
        for stage in reversed(self.up):
            h_BCHW = stage.upsample(stage.block(h_BCHW))
        return self.conv_out(F.silu(self.norm_out(h_BCHW)))


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        self.attn_1 = AttentionBlock(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class ResidualBlock(nn.Module):
    """Two times norm, SiLU, convolution; around them the input, projected where the width changes."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=_EPS)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=_EPS)
        self.conv2 = Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW)))
        return self.nin_shortcut(x_BCHW) + h_BCHW


class AttentionBlock(nn.Module):
    """Self-attention with one head over all positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=_EPS)
        self.q = Conv2d(channels, channels, 1)
        self.k = Conv2d(channels, channels, 1)
        self.v = Conv2d(channels, channels, 1)
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.norm(x_BCHW)
        q, k, v = (
            rearrange(project(h_BCHW), "b c h w -> b 1 (h w) c") for project in (self.q, self.k, self.v)
        )
        h_B1NC = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        return x_BCHW + self.proj_out(rearrange(h_B1NC, "b 1 (h w) c -> b c h w", h=x_BCHW.shape[2]))


class Downsample(nn.Module):
    """Halve the size; the odd row and column of padding lie right and below, as in the original."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the size by repeating pixels, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


def _residuals(count: int, inputs: int, outputs: int, groups: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(outputs if i else inputs, outputs, groups) for i in range(count)))


def _memory_format(device: torch.device) -> torch.memory_format:
    """Channels last is twice as fast for convolutions on CPUs; on CUDA the group norms would undo it."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def load_flux_vae(path: Path | FluxVAECheckpoint, *, device: torch.device, dtype: torch.dtype) -> FluxVAE:
    """Load an autoencoder of any layout, frozen.

    Raises:
        CheckpointError: as `inspect_flux_vae` does.
    """
    found = path if isinstance(path, FluxVAECheckpoint) else inspect_flux_vae(path)
    with torch.device("meta"):
        vae = FluxVAE(found.params)
    sources = {name: Source((tensor,)) for name, tensor in found.sources.items()}
    load_module(vae, found.checkpoint, sources, device=device, dtype=dtype)
    return vae.eval().to(memory_format=_memory_format(device))
