"""Kandinsky 5.0 Image as trainer and sampler use it: loading, and velocity in the house convention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.core.errors import ConfigError
from library.data.batch import Condition
from library.models.kandinsky5_dit import Kandinsky5DiT
from library.models.kandinsky5_format import (
    T2I,
    Kandinsky5Checkpoint,
    Kandinsky5Params,
    inspect_kandinsky5,
    quantisable_layers,
)
from library.models.transformer_loading import LoadOptions, load_transformer
from library.nn.running.routing import Routing


def load_kandinsky5(source: Path | Kandinsky5Checkpoint, **how: Any) -> Kandinsky5DiT:
    """Load a transformer from any layout, frozen and in eval mode.

    The time embedding's weights stay fp32; those of modulation have the model's dtype, and are multiplied in
    fp32.

    Args:
        source: a path, or what `inspect_kandinsky5` returned for it.
        how: `LoadOptions`; `device` and `dtype` must be given.

    Raises:
        CheckpointError: the file is not a whole Kandinsky 5 image transformer.
        ConfigError, MissingPackageError: the attention kernel cannot be used here, the model has fewer
            blocks than are to be swapped, or layers that the scheme cannot quantise.
    """
    options = LoadOptions(**how)
    options.check()
    found = source if isinstance(source, Kandinsky5Checkpoint) else inspect_kandinsky5(source)
    layers = quantisable_layers(found.params)
    build = partial(Kandinsky5DiT, found.params)
    return load_transformer(build, found, options, quantisable=layers, in_fp32="time_embeddings.")


def velocity(
    model: Kandinsky5DiT, x_BCHW: Tensor, sigma_B: Tensor, conditions: Sequence[Condition]
) -> Tensor:
    """Predict the velocity of pictures of one size, see `velocities`."""
    return torch.stack(velocities(model, x_BCHW.unbind(0), sigma_B, conditions))


def velocities(
    model: Kandinsky5DiT,
    x: Sequence[Tensor],
    sigma_B: Tensor,
    conditions: Sequence[Condition],
    routing: Routing | None = None,
) -> list[Tensor]:
    """Predict noise - x0 at noise level sigma (0 clean .. 1 noise), fp32, (C, h, w) a picture.

    The network predicts just that; its clock shows 1000 sigma. What an image-to-image model is given is put
    together here: noisy latents, source latents and a mask, which is 1 where there is a source.

    `routing`: which tokens skip which visual blocks, in training.

    Raises:
        ConfigError: a source picture for a model that draws from texts alone.
    """
    device = x[0].device
    inputs = [
        _with_source(model.params, x_Chw, condition.source_Chw)
        for x_Chw, condition in zip(x, conditions, strict=True)
    ]
    tokens = [condition.tokens_LD.to(device, non_blocking=True) for condition in conditions]
    pooled_BP = torch.stack([condition.pooled_D for condition in conditions]).to(device, non_blocking=True)
    predictions = model(inputs, 1000.0 * sigma_B.float(), tokens, pooled_BP, routing)
    return [predicted.float() for predicted in predictions]


def _with_source(params: Kandinsky5Params, x_Chw: Tensor, source_Chw: Tensor | None) -> Tensor:
    """Return the network's input for one picture. Without a source, source and mask are 0."""
    if params.task == T2I:
        if source_Chw is not None:
            raise ConfigError(
                "This Kandinsky 5 model draws from texts alone (text-to-image), so it cannot take a source "
                "picture: name an image-to-image model, or leave the sources out."
            )
        return x_Chw
    if source_Chw is None:
        return torch.cat((x_Chw, torch.zeros_like(x_Chw), torch.zeros_like(x_Chw[:1])))
    assert source_Chw.shape == x_Chw.shape, f"a source of {source_Chw.shape} for latents of {x_Chw.shape}"
    return torch.cat((x_Chw, source_Chw.to(x_Chw, non_blocking=True), torch.ones_like(x_Chw[:1])))
