"""Gradient checkpointing whose checkpoints wait in the computer's memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def offloaded_checkpoint(block: Callable[..., Tensor], x: Tensor, *others: object) -> Tensor:
    """Return `block(x, *others)`; for backward it is computed again from a copy of `x` in CPU memory.

    The copies to and from page-locked memory are queued like any other work of the GPU, so nothing waits, and
    what is computed is bit for bit what `torch.utils.checkpoint` computes.
    """

    def run(anchor: Tensor, parked: _Parked) -> Tensor:
        return block(parked.take(), *others)

    # The random state that dropout needs is kept for the devices of tensor arguments: so there is one.
    return checkpoint(run, x.new_empty(0), _Parked(x), use_reentrant=False)


class _Parked:
    """A tensor that is there once, and afterwards is fetched from CPU memory."""

    def __init__(self, x: Tensor) -> None:
        self._x: Tensor | None = x
        self._device, self._needs_grad = x.device, x.requires_grad
        self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        self._copy.copy_(x.detach(), non_blocking=True)

    def take(self) -> Tensor:
        if self._x is not None:
            x, self._x = self._x, None
            return x
        return self._copy.to(self._device, non_blocking=True).requires_grad_(self._needs_grad)
