"""A small FLUX autoencoder that works without having been trained: its weights are worked out, not learned.

The network is the ordinary one (convolutions, group norms, SiLU, residual blocks, attention), wired so that
what it computes is nearly linear:

* Residual branches and attention are random and weak (`_BRANCH`), so blocks pass on their input.
* Encoder: the first two downsampling convolutions move each 2x2 square of pixels into channels; the third
  turns the 48 channels of a 2x2 square, an 8x8 block of the picture, into 16 cosine coefficients of it.
* Decoder: only the mean colour of each block is used (nearest-neighbour upsampling cannot place anything
  finer inside a block), sharpened, then smoothed at each doubling. A picture comes back soft but itself.
* A group norm in the way would erase mean and contrast. So each of its groups of three channels holds
  (s, -s, K): s adds nothing to the mean, the large constant K fixes the variance. SiLU(s) - SiLU(-s) = s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from library.core.seeds import generator
from library.models.flux_vae_format import FluxVAEParams, parameter_shapes

# The widths at both ends feed the final norms, which need three channels a group.
PARAMS = FluxVAEParams(channels=(96, 64, 64, 96), blocks=1)
_BRANCH = 0.01
_K = 32.0
_GAIN = _K * math.sqrt(2) / 3  # standard deviation of a group (s, -s, K) for small s
_LOG_VARIANCE = -10.0
# Luma, blue and red difference of RGB in [-1, 1]; and back.
_TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
_LOW = ((0, 0), (0, 1), (1, 0), (1, 1))  # (vertical, horizontal) frequency
_HIGHER = ((0, 2), (2, 0), (1, 2), (2, 1))
# What each latent channel holds: colour, frequencies, and a factor that brings it near unit deviation.
_COEFFICIENTS = [
    *((0, v, h, 2.0 + 5.0 * (v + h)) for v, h in _LOW + _HIGHER),
    *((c, v, h, 7.0 + 40.0 * (v + h)) for c in (1, 2) for v, h in _LOW),
]


def autoencoder_tensors(seed: int) -> dict[str, Tensor]:
    """Return the tensors by the names of the original FLUX file, fp32."""
    tensors = {name: _random(seed, name, shape) for name, shape in parameter_shapes(PARAMS)}
    _wire_encoder(tensors)
    _wire_decoder(tensors)
    return tensors


def _random(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Branches are random, their last layers weak; the straight path starts at zero and is wired later."""
    noise = torch.randn(shape, generator=generator(seed, "autoencoder", name))
    if "norm" in name:
        return noise * 0.1 + (1.0 if name.endswith(".weight") else 0.0)
    if len(shape) == 4 and any(part in name for part in (".conv1.", ".attn_1.", ".conv2.")):
        weak = _BRANCH if ".conv2." in name or ".proj_out." in name else 1.0
        return noise * weak / math.sqrt(math.prod(shape[1:]))
    if ".nin_shortcut.weight" in name:
        return torch.eye(shape[0], shape[1])[:, :, None, None]
    return torch.zeros(shape)


def _wire_encoder(t: dict[str, Tensor]) -> None:
    t["encoder.conv_in.weight"][:3, :, 1, 1] = _TO_YCC
    for level, colours in ((0, 3), (1, 12)):
        weight = t[f"encoder.down.{level}.downsample.conv.weight"]
        for y, x, c in _square(colours):
            weight[(2 * y + x) * colours + c, c, y, x] = 1.0  # taps 0 and 1 are the square, 2 is beyond it
    to_latent = t["encoder.down.2.downsample.conv.weight"]
    for y, x, channel in _square(48):  # a channel is (which square, which pixel of it, which colour)
        outer, inner, colour = channel // 12, channel // 3 % 4, channel % 3
        row, column = 4 * y + 2 * (outer // 2) + inner // 2, 4 * x + 2 * (outer % 2) + inner % 2
        for k, (c, v, h, factor) in enumerate(_COEFFICIENTS):
            if c == colour:
                to_latent[k, channel, y, x] = factor * _cosine(v, row) * _cosine(h, column) / 64
    _leave_through_norm(t, "encoder", "encoder.down.3.block.0", PARAMS.latent_channels, 1 / PARAMS.scale)
    t["encoder.conv_out.bias"][: PARAMS.latent_channels] = PARAMS.shift
    t["encoder.conv_out.bias"][PARAMS.latent_channels :] = _LOG_VARIANCE


def _wire_decoder(t: dict[str, Tensor]) -> None:
    means = [k for k, (_, v, h, _) in enumerate(_COEFFICIENTS) if v == h == 0]
    factors = torch.tensor([_COEFFICIENTS[k][3] for k in means])
    to_rgb = torch.linalg.inv(_TO_YCC) / factors * PARAMS.scale  # columns undo each mean's factor
    sharpen = torch.tensor([[0.0, -0.15, 0.0], [-0.15, 1.6, -0.15], [0.0, -0.15, 0.0]])
    t["decoder.conv_in.weight"][:3, means] = to_rgb[:, :, None, None] * sharpen
    t["decoder.conv_in.bias"][:3] = -to_rgb.sum(1) * PARAMS.shift
    smooth = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))
    for level in (3, 2, 1):
        for c in range(3):
            t[f"decoder.up.{level}.upsample.conv.weight"][c, c] = smooth
    _leave_through_norm(t, "decoder", "decoder.up.0.block.0", 3, 1.0)


def _leave_through_norm(t: dict[str, Tensor], part: str, widening: str, signals: int, factor: float) -> None:
    """Carry signals through the last group norm and SiLU of encoder or decoder unchanged, times `factor`.

    The block `widening` goes from 64 to 96 channels; its shortcut lays each signal out as a group (s, -s, K),
    which has the mean K/3 and the deviation `_GAIN`, so the norm's own weight and bias can undo it.
    """
    spread, out = t[f"{widening}.nin_shortcut.weight"], t[f"{part}.conv_out.weight"]
    spread.zero_()
    for k in range(signals):
        spread[3 * k, k], spread[3 * k + 1, k] = 1.0, -1.0
        out[k, 3 * k, 1, 1], out[k, 3 * k + 1, 1, 1] = factor, -factor
    t[f"{widening}.nin_shortcut.bias"][2::3] = _K
    t[f"{part}.norm_out.weight"][:] = _GAIN
    t[f"{part}.norm_out.bias"][:] = _K / 3


def _square(channels: int) -> Iterator[tuple[int, int, int]]:
    return ((y, x, c) for y in range(2) for x in range(2) for c in range(channels))


def _cosine(frequency: int, position: int) -> float:
    """One sample of the type-II cosine basis of length 8, scaled so that frequency 0 gives the mean."""
    return math.cos(math.pi * (position + 0.5) * frequency / 8) * (1.0 if frequency == 0 else math.sqrt(2))
