"""Lumina Image 2.0 as the trainer and the sampler use it: loading, and velocity in the house convention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from library.core.device import keep_freed_memory
from library.data.batch import Condition
from library.models.lumina2_format import Lumina2Checkpoint, inspect_lumina2, quantisable_layers
from library.models.nextdit import NextDiT
from library.nn.attention import check_kernel
from library.nn.block_swap import chosen_blocks, device_of_weights, make_ring
from library.nn.quant import stored_names, use_quant_layers
from library.nn.weights import Source, load_module
from library.options.quant import QuantOptions
from library.options.swap import SwapOptions

_NO_SWAP, _WHOLE = SwapOptions(), QuantOptions()


def load_nextdit(
    source: Path | Lumina2Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "auto",
    mmap: bool = True,
    swap: SwapOptions = _NO_SWAP,
    weights_on: torch.device | None = None,
    quant: QuantOptions = _WHOLE,
) -> NextDiT:
    """Load a transformer from any layout, frozen and in eval mode.

    Args:
        source: a path, or what `inspect_lumina2` returned for it.
        dtype: of weights and activations. The timestep embedder stays fp32: bf16 cannot tell neighbouring
            times apart, and it is a thousandth of the model.
        attention: a kernel of `library.nn.attention`; on the meta device one that is nearest to it.
        mmap: map the files into memory; else read them.
        swap: how many blocks wait in the computer's memory until it is their turn.
        weights_on: where the weights go, if not to `device`; the caller takes them there.
        quant: in how many bits the linear layers of the blocks are kept, but for modulation. A file whose
            layers are quantised already keeps them as they are.

    Raises:
        CheckpointError: the file is not a whole Lumina Image 2.0 transformer.
        ConfigError, MissingPackageError: the attention kernel cannot be used here, the model has fewer
            blocks than are to be swapped, or layers that the scheme cannot quantise.
    """
    device = torch.device(device)
    if device.type == "meta":
        attention = "auto" if attention in ("auto", "varlen", "flash") else "torch"
    check_kernel(attention, device, dtype)
    if device.type == "cpu":
        keep_freed_memory()
    found = source if isinstance(source, Lumina2Checkpoint) else inspect_lumina2(source)
    with torch.device("meta"):
        model = NextDiT(found.params)
    if found.quant.scheme is not None:
        use_quant_layers(model, found.quant.layers, found.quant.scheme)
    elif quant.transformer is not None:
        use_quant_layers(model, quantisable_layers(found.params), quant.transformer)
    swapped = [] if device.type == "meta" else chosen_blocks(model.runner.blocks, swap)
    sources = {name: Source(names) for name, names in found.sources.items()}
    stored = set(stored_names(model))
    load_module(
        model,
        found.checkpoint,
        sources,
        device=weights_on or device_of_weights(model, swapped, device),
        dtype=lambda name: None if name in stored else _dtype_of(name, dtype),
        mmap=mmap,
        quantise_on=quant.quantise_on,
    )
    model.runner.ring = make_ring(swapped, device, swap)
    model.use_attention(attention)
    return model.eval()


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.startswith("t_embedder.") else dtype


def velocity(model: NextDiT, x_BCHW: Tensor, sigma_B: Tensor, conditions: Sequence[Condition]) -> Tensor:
    """Predict the velocity of pictures of one size, see `velocities`."""
    return torch.stack(velocities(model, x_BCHW.unbind(0), sigma_B, conditions))


def velocities(
    model: NextDiT, x: Sequence[Tensor], sigma_B: Tensor, conditions: Sequence[Condition]
) -> list[Tensor]:
    """Predict noise - x0 at noise level sigma (0 clean .. 1 noise), fp32, (C, h, w) a picture.

    The network's own clock runs the other way, t = 1 - sigma, and its output is x0 - noise. This is the one
    place where that is translated.
    """
    captions = [condition.tokens_LD.to(x[0].device, non_blocking=True) for condition in conditions]
    return [-predicted.float() for predicted in model(x, 1.0 - sigma_B.float(), captions)]
