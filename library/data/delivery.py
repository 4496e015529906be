"""Batches on their way to the device: the next one is carried there while the one before it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from library.core.errors import UserError
from library.data.batch import Batch

Arrival = TypeVar("Arrival")  # the end of a batch's copies


class Carrier(Protocol[Arrival]):
    """Copies tensors to a device beside its computation."""

    def send(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Arrival]:
        """Begin to copy; return the copies, which are not there yet. The sources are page-locked."""

    def receive(self, copies: Sequence[Tensor], arrival: Arrival) -> None:
        """Let computation that is queued from now on wait for the copies, which it may then use."""


class CudaCarrier:
    """Copies on a CUDA stream of their own; the program waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event]:
        """Queue the copies."""
        with torch.cuda.stream(self._stream):
            copies = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
        return copies, self._stream.record_event()

    def receive(self, copies: Sequence[Tensor], arrival: torch.cuda.Event) -> None:
        """Let the current stream wait; once freed, the copies' memory stays theirs until it is done with."""
        computation = torch.cuda.current_stream(self._device)
        computation.wait_event(arrival)
        for copy in copies:
            copy.record_stream(computation)


def carrier_for(device: torch.device) -> CudaCarrier | None:
    """Return the carrier of a device; None where there is nothing to gain from one."""
    return CudaCarrier(device) if device.type == "cuda" else None


def delivered(
    batches: Iterator[tuple[int, int, Batch]], carrier: Carrier[Arrival]
) -> Iterator[tuple[int, int, Batch]]:
    """Yield (step, micro, batch) with the batches on the device; each is sent off while the one before it is
    still in use. Closing the iterator closes `batches`.

    What `batches` raises for a batch is raised in its place.
    """
    waiting: tuple[int, int, Batch, list[Tensor], Arrival] | None = None
    failure: UserError | None = None
    with closing(batches):
        try:
            for step, micro, batch in batches:
                sources = _tensors(batch)
                coming = (step, micro, batch, *carrier.send(sources))
                if waiting is not None:
                    yield _received(waiting, carrier)
                waiting = coming
        except UserError as error:
            failure = error
        if waiting is not None:
            yield _received(waiting, carrier)
        if failure is not None:
            raise failure


def _tensors(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    batch.map(lambda tensor: found.append(tensor) or tensor)
    return found


def _received(
    sent: tuple[int, int, Batch, list[Tensor], Arrival], carrier: Carrier[Arrival]
) -> tuple[int, int, Batch]:
    step, micro, batch, copies, arrival = sent
    carrier.receive(copies, arrival)
    there = iter(copies)
    return step, micro, batch.map(lambda _: next(there))
