"""What is measured of a step, beside its loss: where its time goes, the network's size, loss by sigma."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from library.core.dist import Processes

BANDS = 5  # of equal width, as far apart as validation's sigmas, which lie in their middles

Item = TypeVar("Item")


class StepClock:
    """Times steps, from asking for the data on; what happens between steps is not counted."""

    def __init__(self) -> None:
        self._began = self._waited = 0.0

    def watch(self, steps: Iterator[Item]) -> Iterator[Item]:
        """Yield the items of `steps`, timing how long each is waited for."""
        while True:
            self._began = time.perf_counter()
            try:
                item = next(steps)
            except StopIteration:
                return
            self._waited = time.perf_counter() - self._began
            yield item

    def read(self, pictures: int) -> dict[str, float]:
        """Return speed and waiting time of the step that ends now; `pictures` counts all processes."""
        seconds = time.perf_counter() - self._began
        return {"speed/images_per_second": pictures / seconds, "speed/data_wait_seconds": self._waited}


class SigmaBands:
    """The training loss of a step's pictures by band of sigma, over all processes.

    Losses are those that are trained on: weighted, and before the update.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._seen: list[tuple[Tensor, Tensor]] = []

    def add(self, sigma_B: Tensor, losses_B: Tensor) -> None:
        """Take note of a micro-batch. The losses stay where they are until `read`, so nothing waits here."""
        self._seen.append((sigma_B, losses_B.detach()))

    def read(self) -> dict[str, float]:
        """Return the mean loss of each band that had a picture, then forget them. A collective call."""
        sums, counts = [0.0] * BANDS, [0.0] * BANDS
        for sigma_B, losses_B in self._seen:
            for sigma, loss in zip(sigma_B.tolist(), losses_B.tolist(), strict=True):
                band = min(int(sigma * BANDS), BANDS - 1)
                sums[band] += loss
                counts[band] += 1
        self._seen.clear()
        table = self._processes.sum(torch.tensor([sums, counts], device=self._processes.device))
        names = [f"loss/sigma_{band / BANDS:.1f}_{(band + 1) / BANDS:.1f}" for band in range(BANDS)]
        return {name: s / n for name, s, n in zip(names, *table.tolist(), strict=True) if n}


@torch.no_grad()
def weight_norms(network: nn.Module) -> dict[str, float]:
    """Return the norm of all weights of a kind together, for instance of all `up` matrices."""
    kinds: dict[str, list[Tensor]] = {}
    for name, parameter in network.named_parameters():
        kinds.setdefault(name.rpartition(".")[2], []).append(parameter)
    norms = torch.stack([nn.utils.get_total_norm(parameters) for parameters in kinds.values()]).tolist()
    return {f"norm/{kind}": norm for kind, norm in zip(kinds, norms, strict=True)}
