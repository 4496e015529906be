"""Random weights that keep activations O(1), for networks whose tensors are named as usual."""

from __future__ import annotations

import torch
from torch import Tensor

from library.core.seeds import generator


def random_tensor(seed: int, stream: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor `name`: a matrix by 1/sqrt(fan in), a bias small, a norm's weight near one.

    A function of (seed, stream, name). Nothing is zero that a fresh network starts at zero (modulation,
    gates, last layer), so there is a gradient to every part and a test cannot pass because a branch is off.
    fp32, with values that bf16 holds exactly.
    """
    noise = torch.randn(shape, generator=generator(seed, stream, name))
    if len(shape) == 2:
        values = noise / shape[1] ** 0.5
    elif name.endswith(".bias"):
        values = 0.2 * noise
    else:
        values = 1.0 + 0.1 * noise
    return values.bfloat16().float()
