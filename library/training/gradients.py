"""The gradients of a step, from the last backward to the update: summed, measured, scaled, forgotten.

They are where torch has them, in `parameter.grad`, so that any optimizer finds them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from library.core.device import sent
from library.core.dist import Processes

_PIECE = 2**18  # numbers whose squares are added up in a row


class Gradients(ABC):
    """All gradients of a step. In this order: `collect`, `norm`, perhaps `scale`, the update, `clear`."""

    @property
    def moves_weights(self) -> bool:
        """Whether weights move during backward, each as soon as its gradient is there, and all of them have
        by the end of `collect`: there is nothing left to scale, or for an optimizer to do.
        """
        return False

    @abstractmethod
    def collect(self, processes: Processes) -> None:
        """See to it, after the last backward, that all gradients are there, summed over the processes."""

    @abstractmethod
    def norm(self) -> Tensor:
        """Return the norm of all of them together, 0-dim fp32 on the main device; nothing waits for it."""

    @abstractmethod
    def scale(self, factor: float) -> None:
        """Multiply them by a factor, in place."""

    @abstractmethod
    def clear(self) -> None:
        """Forget them, after the step."""

    def close(self) -> None:  # noqa: B027 - most have nothing to let go of
        """Watch the weights no more. Until then torch's hooks may keep them, the model and all, in memory."""


class PlainGradients(Gradients):
    """Gradients as backward makes them, each where its weight is, which may be on several devices."""

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        """`device`: the main one, on which norms come together."""
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._device = device
        self._kinds: list[list[Tensor]] = []  # the gradients that `norm` found

    def collect(self, processes: Processes) -> None:
        """Sum the gradients over the processes, piece by piece."""
        processes.sum_gradients(self._parameters)

    def norm(self) -> Tensor:
        """Return the norm over all devices."""
        self._kinds = _by_kind(grad for weight in self._parameters if (grad := weight.grad) is not None)
        norms = [self._on_main_device(norms_of(gradients)) for gradients in self._kinds]
        return torch.linalg.vector_norm(torch.cat(norms or [torch.zeros(1, device=self._device)]))

    def scale(self, factor: float) -> None:
        """Multiply the gradients by a factor."""
        for gradients in self._kinds:
            torch._foreach_mul_(gradients, factor)

    def clear(self) -> None:
        """Let go of the gradients."""
        self._kinds = []
        for parameter in self._parameters:
            parameter.grad = None

    def _on_main_device(self, norms: Tensor) -> Tensor:
        return sent(norms, self._device) if norms.device.type == "cpu" else norms.to(self._device)


def _by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return tensors by device and dtype, which is how torch's operations on many want them."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(kinds.values())


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of each tensor, fp32."""
    if not tensors:
        return torch.zeros(0)
    if tensors[0].device.type == "cpu" and max(map(Tensor.numel, tensors)) > _PIECE:
        tensors = [_norm_by_pieces(tensor) if tensor.numel() > _PIECE else tensor for tensor in tensors]
    return torch.stack(torch._foreach_norm(tensors, dtype=torch.float32))


def _norm_by_pieces(tensor: Tensor) -> Tensor:
    """Return the norm of a tensor on the CPU, (1,) fp32.

    torch adds up the squares one by one there, which loses the third digit on tens of millions of numbers,
    and takes seven times as long for bf16.
    """
    pieces = tensor.flatten().split(_PIECE)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.float()) for p in pieces]))[None]
