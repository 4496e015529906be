"""What is measured of a step, beside its loss: where its time goes, the network's size, loss by sigma."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from library.core.device import sent
from library.training.gradients import norms_of

EVERY = 10  # steps from one look at all weights to the next
BANDS = 5  # of equal width, as far apart as validation's sigmas, which lie in their middles

_BANDS = range(BANDS)
_NAMES = [f"loss/sigma_{band / BANDS:.1f}_{(band + 1) / BANDS:.1f}" for band in _BANDS]

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

    Losses are those that are trained on: weighted, and before the update. A process that is alone reads them
    as they are; several add them up on their devices, band by band.
    """

    def __init__(self, device: torch.device, *, shared: bool) -> None:
        """`shared`: there are several processes."""
        self.shared = shared
        self._device = device
        self._seen: list[tuple[Sequence[float], Tensor]] = []
        self._bands: list[int] = []  # of the losses that were measured last

    def add(self, sigmas: Sequence[float], losses_B: Tensor) -> None:
        """Take note of a micro-batch."""
        self._seen.append((sigmas, losses_B.detach()))

    def measure(self, step: int) -> Tensor:
        """Return the losses, or each band's sum of losses and then its number of pictures; forget them."""
        self._bands = [min(int(sigma * BANDS), BANDS - 1) for some, _ in self._seen for sigma in some]
        losses = [losses_B for _, losses_B in self._seen]
        self._seen.clear()
        if not self.shared:
            return torch.cat(losses) if losses else torch.zeros(0, device=self._device)
        return self._by_band(torch.cat(losses)) if losses else torch.zeros(2 * BANDS, device=self._device)

    def named(self, numbers: Sequence[float]) -> dict[str, float]:
        """Return the mean loss of each band that had a picture."""
        if self.shared:
            sums, counts = numbers[:BANDS], numbers[BANDS:]
        else:
            members = [[x for x, own in zip(numbers, self._bands, strict=True) if own == b] for b in _BANDS]
            sums, counts = [sum(some) for some in members], [len(some) for some in members]
        return {name: s / n for name, s, n in zip(_NAMES, sums, counts, strict=True) if n}

    def _by_band(self, losses_B: Tensor) -> Tensor:
        members_NB = torch.tensor([[own == band for own in self._bands] for band in _BANDS])
        # Not a product with the members: one loss that is not a number would spoil every band.
        sums = losses_B.where(sent(members_NB, self._device), 0.0).sum(1)
        return torch.cat([sums, sent(members_NB.sum(1).float(), self._device)])


class WeightNorms:
    """The norm of all trained weights of a kind together, for instance of all `up` matrices.

    They change slowly and to read them all takes time, so that is done in the first step and in every 10th.
    """

    shared = False  # it is the same on every process

    def __init__(self, network: nn.Module) -> None:
        self._kinds: dict[str, list[Tensor]] = {}
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                self._kinds.setdefault(name.rpartition(".")[2], []).append(parameter)
        self._nothing = torch.zeros(0, device=next(network.parameters()).device)

    @torch.no_grad()
    def measure(self, step: int) -> Tensor:
        """Return one norm a kind, or nothing."""
        if step > 0 and (step + 1) % EVERY:
            return self._nothing
        norms_P = norms_of([weight for weights in self._kinds.values() for weight in weights])
        kinds = norms_P.split([len(weights) for weights in self._kinds.values()])
        return torch.stack([torch.linalg.vector_norm(norms) for norms in kinds])

    def named(self, numbers: Sequence[float]) -> dict[str, float]:
        """Name the norms after their kinds."""
        if not numbers:
            return {}
        return {f"norm/{kind}": norm for kind, norm in zip(self._kinds, numbers, strict=True)}
