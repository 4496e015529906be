"""What is asked of a new network. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from networks.files import LoRAFile


@dataclass(frozen=True, kw_only=True)
class NetworkRequest:
    """What is asked of a new network.

    Attributes:
        dim: rank where `args` does not set another. alpha: None or 0 means each layer's rank.
        dropout: probability with which entries of the rank-wide hidden features are dropped in training.
        args: `--network_args`, by key.
        seed: the start weights are a function of it and of each layer's name.
        sizes_from: take layers, ranks, alphas and kind from this file instead; its weights are not loaded.
        device: where its weights shall lie; None: where the layers' weights lie.
        lr: the rate that it learns at; None: that of `parameter_groups`.
    """

    dim: int
    alpha: float | None = None
    dropout: float | None = None
    args: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    sizes_from: LoRAFile | None = None
    device: torch.device | None = None
    lr: float | None = None
