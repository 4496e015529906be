"""A GPU on which memory can be counted."""

from __future__ import annotations

import torch
from torch import nn


def warm_gpu() -> torch.device:
    """Return the GPU, once this thread and autograd's have multiplied there.

    For its first product each gets a workspace from torch's allocator, which counts as used memory from then
    on: 8 MiB, and 32 of Hopper's generation.
    """
    gpu = torch.device("cuda")
    x = torch.randn(64, 64, device=gpu, requires_grad=True)
    nn.Linear(64, 64, device=gpu)(x @ x).sum().backward()
    torch.cuda.synchronize()
    return gpu
