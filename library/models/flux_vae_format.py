"""The FLUX autoencoder as files: which layout, which sizes, which tensor is which. No torch.

Layouts: the original one (`encoder.down.0.block.0...`) and that of `diffusers.AutoencoderKL`
(`encoder.down_blocks.0.resnets.0...`), either of them bare or under `vae.` or `first_stage_model.`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.core.checkpoint_files import Checkpoint, open_checkpoint
from library.core.errors import CheckpointError
from library.models.checkpoint_kind import refuse, require_tensors

FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159  # constants of the published autoencoder; its file does not hold them
_PREFIXES = ("", "vae.", "first_stage_model.")
_WANTED = "a FLUX autoencoder"
_STAGE = re.compile(r"encoder\.down(?:_blocks)?\.(\d+)\.(?:block|resnets)\.(\d+)\.conv1\.weight")
NamedShape = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class FluxVAEParams:
    """Sizes of the autoencoder; `channels` by level, finest first."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2  # residual blocks a level; the decoder has one more
    latent_channels: int = 16
    groups: int = 32
    scale: float = FLUX_SCALE
    shift: float = FLUX_SHIFT

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.channels)

    @property
    def stride(self) -> int:
        """Pixels a latent, in both directions."""
        return 2 ** (self.levels - 1)


@dataclass(frozen=True)
class FluxVAECheckpoint:
    """An autoencoder that was found whole. `sources`: parameter name -> tensor name in `checkpoint`."""

    checkpoint: Checkpoint
    layout: str
    params: FluxVAEParams
    sources: dict[str, str]


def inspect_flux_vae(path: Path) -> FluxVAECheckpoint:
    """Read the headers of an autoencoder and check that it is whole. No tensor is loaded.

    Args:
        path: a `.safetensors` file, or a folder (of the model, or of a diffusers pipeline with `vae/`).

    Raises:
        CheckpointError: unreadable, truncated, of another kind, or with tensors missing, extra or misshapen.
    """
    found = open_checkpoint(path, subfolder="vae")
    prefix = next((p for p in _PREFIXES if f"{p}decoder.conv_in.weight" in found.tensors), None)
    if prefix is None:
        refuse(found, _WANTED)
    checkpoint = found.with_prefix_stripped(prefix)
    if any(name.startswith(("quant_conv.", "post_quant_conv.")) for name in checkpoint.tensors):
        refuse(found, _WANTED)
    diffusers = any(name.startswith("encoder.down_blocks.") for name in checkpoint.tensors)
    params = _read_params(checkpoint)
    shapes = dict(parameter_shapes(params))
    sources = {name: diffusers_name(name, params.levels) if diffusers else name for name in shapes}
    require_tensors(checkpoint, {sources[n]: shape for n, shape in shapes.items()}, "FLUX autoencoder")
    return FluxVAECheckpoint(checkpoint, "diffusers" if diffusers else "original", params, sources)


def _read_params(checkpoint: Checkpoint) -> FluxVAEParams:
    """Count levels and blocks, read widths; gaps are filled, so that the tensors they lack get named."""
    widths: dict[int, int] = {}
    blocks = 1
    for name, info in checkpoint.tensors.items():
        if match := _STAGE.fullmatch(name):
            widths[int(match[1])] = info.shape[0]
            blocks = max(blocks, int(match[2]) + 1)
    if not widths:
        refuse(checkpoint, _WANTED)
    config = checkpoint.config if checkpoint.config.get("_class_name") == "AutoencoderKL" else {}
    return FluxVAEParams(
        channels=tuple(widths.get(level, max(widths.values())) for level in range(max(widths) + 1)),
        blocks=blocks,
        latent_channels=checkpoint.shape("decoder.conv_in.weight")[1],
        groups=_number(config, "norm_num_groups", 32, checkpoint),
        scale=_number(config, "scaling_factor", FLUX_SCALE, checkpoint),
        shift=_number(config, "shift_factor", FLUX_SHIFT, checkpoint),
    )


def _number(config: dict[str, object], key: str, default: float, checkpoint: Checkpoint) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float):
        raise CheckpointError(f"config.json of {checkpoint.path}: {key} is {value!r}, but must be a number.")
    return value


def parameter_shapes(params: FluxVAEParams) -> Iterator[NamedShape]:
    """Yield every tensor of the autoencoder by its original name, with its shape."""
    width, top = params.channels[0], params.channels[-1]
    yield from _conv("encoder.conv_in", width, 3, 3)
    for level, channels in enumerate(params.channels):
        for block in range(params.blocks):
            yield from _residual(f"encoder.down.{level}.block.{block}", width, channels)
            width = channels
        if level < params.levels - 1:
            yield from _conv(f"encoder.down.{level}.downsample.conv", channels, channels, 3)
    yield from _middle("encoder.mid", top)
    yield from _norm("encoder.norm_out", top)
    yield from _conv("encoder.conv_out", 2 * params.latent_channels, top, 3)
    yield from _conv("decoder.conv_in", top, params.latent_channels, 3)
    yield from _middle("decoder.mid", top)
    for level in reversed(range(params.levels)):
        channels = params.channels[level]
        for block in range(params.blocks + 1):
            yield from _residual(f"decoder.up.{level}.block.{block}", width, channels)
            width = channels
        if level > 0:
            yield from _conv(f"decoder.up.{level}.upsample.conv", channels, channels, 3)
    yield from _norm("decoder.norm_out", width)
    yield from _conv("decoder.conv_out", 3, width, 3)


def _conv(name: str, outputs: int, inputs: int, kernel: int) -> Iterator[NamedShape]:
    yield f"{name}.weight", (outputs, inputs, kernel, kernel)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, channels: int) -> Iterator[NamedShape]:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


def _residual(name: str, inputs: int, outputs: int) -> Iterator[NamedShape]:
    yield from _norm(f"{name}.norm1", inputs)
    yield from _conv(f"{name}.conv1", outputs, inputs, 3)
    yield from _norm(f"{name}.norm2", outputs)
    yield from _conv(f"{name}.conv2", outputs, outputs, 3)
    if inputs != outputs:
        yield from _conv(f"{name}.nin_shortcut", outputs, inputs, 1)


def _middle(name: str, channels: int) -> Iterator[NamedShape]:
    yield from _residual(f"{name}.block_1", channels, channels)
    yield from _norm(f"{name}.attn_1.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{name}.attn_1.{part}", channels, channels, 1)
    yield from _residual(f"{name}.block_2", channels, channels)


def diffusers_name(name: str, levels: int) -> str:
    """Return what `diffusers.AutoencoderKL` calls a tensor of the original layout.

    Its decoder counts levels from the coarsest, the original from the finest.
    """
    name = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", name)
    for pattern, replacement in _DIFFUSERS_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


_DIFFUSERS_NAMES = (
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
