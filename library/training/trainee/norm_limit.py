"""--scale_weight_norms: what became too large is scaled down after each update, and that is told."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from networks.lora import LoRANetwork

_NAMES = ("max_norm/keys_scaled", "max_norm/average_key_norm", "max_norm/max_key_norm")


class NormLimit:
    """Applies --scale_weight_norms after each update.

    What it did is read together with the next step's numbers, so that no step waits for the device twice.
    """

    shared = False

    def __init__(self, network: LoRANetwork, limit: float, device: torch.device) -> None:
        self._network, self._limit = network, limit
        self._nothing = torch.zeros(0, device=device)
        self._done = self._nothing

    def apply(self) -> None:
        """Scale down what is above the limit."""
        self._done = self._network.apply_max_norm(self._limit)

    def measure(self, step: int) -> Tensor:
        """Return what was done after the step before, if there was one."""
        done, self._done = self._done, self._nothing
        return done

    def named(self, numbers: Sequence[float]) -> dict[str, float]:
        """Name the numbers as the reference tool does."""
        return dict(zip(_NAMES, numbers, strict=True)) if numbers else {}

    def last(self) -> dict[str, float]:
        """Return what was done after the last step; this waits for the device."""
        return self.named(self.measure(0).tolist())
