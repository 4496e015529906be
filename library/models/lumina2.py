"""Lumina Image 2.0 as the trainer and the sampler use it: loading, and velocity in the house convention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.data.batch import Condition
from library.models.lumina2_format import Lumina2Checkpoint, inspect_lumina2, quantisable_layers
from library.models.nextdit import NextDiT
from library.models.transformer_loading import LoadOptions, load_transformer
from library.nn.running.routing import Routing


def load_nextdit(source: Path | Lumina2Checkpoint, **how: Any) -> NextDiT:
    """Load a transformer from any layout, frozen and in eval mode.

    The timestep embedder stays fp32: bf16 cannot tell neighbouring times apart, and it is a thousandth of the
    model.

    Args:
        source: a path, or what `inspect_lumina2` returned for it.
        how: `LoadOptions`; `device` and `dtype` must be given.

    Raises:
        CheckpointError: the file is not a whole Lumina Image 2.0 transformer.
        ConfigError, MissingPackageError: the attention kernel cannot be used here, the model has fewer
            blocks than are to be swapped, or layers that the scheme cannot quantise.
    """
    options = LoadOptions(**how)
    options.check()
    found = source if isinstance(source, Lumina2Checkpoint) else inspect_lumina2(source)
    layers = quantisable_layers(found.params)
    build = partial(NextDiT, found.params)
    return load_transformer(build, found, options, quantisable=layers, in_fp32="t_embedder.")


def velocity(model: NextDiT, x_BCHW: Tensor, sigma_B: Tensor, conditions: Sequence[Condition]) -> Tensor:
    """Predict the velocity of pictures of one size, see `velocities`."""
    return torch.stack(velocities(model, x_BCHW.unbind(0), sigma_B, conditions))


def velocities(
    model: NextDiT,
    x: Sequence[Tensor],
    sigma_B: Tensor,
    conditions: Sequence[Condition],
    routing: Routing | None = None,
) -> list[Tensor]:
    """Predict noise - x0 at noise level sigma (0 clean .. 1 noise), fp32, (C, h, w) a picture.

    The network's own clock runs the other way, t = 1 - sigma, and its output is x0 - noise. This is the one
    place where that is translated.

    `routing`: which tokens skip which blocks, in training.
    """
    captions = [condition.tokens_LD.to(x[0].device, non_blocking=True) for condition in conditions]
    return [-predicted.float() for predicted in model(x, 1.0 - sigma_B.float(), captions, routing)]
