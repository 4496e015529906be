"""Lumina Image 2.0 as the trainer and the sampler use it: loading, and velocity in the house convention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from library.core.device import keep_freed_memory
from library.data.batch import Condition
from library.models.lumina2_format import Lumina2Checkpoint, inspect_lumina2
from library.models.nextdit import NextDiT
from library.nn.attention import check_kernel
from library.nn.weights import Source, load_module


def load_nextdit(
    source: Path | Lumina2Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "auto",
    mmap: bool = True,
) -> NextDiT:
    """Load a transformer from any layout, frozen and in eval mode.

    Args:
        source: a path, or what `inspect_lumina2` returned for it.
        dtype: of weights and activations. The timestep embedder stays fp32: bf16 cannot tell neighbouring
            times apart, and it is a thousandth of the model.
        attention: a kernel of `library.nn.attention`; on the meta device always SDPA.
        mmap: map the files into memory; else read them.

    Raises:
        CheckpointError: the file is not a whole Lumina Image 2.0 transformer.
        ConfigError, MissingPackageError: the attention kernel cannot be used here.
    """
    device = torch.device(device)
    attention = "sdpa" if device.type == "meta" else attention
    check_kernel(attention, device, dtype)
    if device.type == "cpu":
        keep_freed_memory()
    found = source if isinstance(source, Lumina2Checkpoint) else inspect_lumina2(source)
    with torch.device("meta"):
        model = NextDiT(found.params)
    sources = {name: Source(names) for name, names in found.sources.items()}
    load_module(
        model,
        found.checkpoint,
        sources,
        device=device,
        dtype=lambda name: _dtype_of(name, dtype),
        mmap=mmap,
    )
    model.use_attention(attention)
    return model.eval()


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.startswith("t_embedder.") else dtype


def velocity(model: NextDiT, x_BCHW: Tensor, sigma_B: Tensor, conditions: Sequence[Condition]) -> Tensor:
    """Predict noise - x0 at noise level sigma (0 clean .. 1 noise), fp32.

    The network's own clock runs the other way, t = 1 - sigma, and its output is x0 - noise. This is the one
    place where that is translated.
    """
    captions = [condition.tokens_LD.to(x_BCHW.device, non_blocking=True) for condition in conditions]
    return -torch.stack(model(x_BCHW.unbind(0), 1.0 - sigma_B.float(), captions)).float()
