"""What turns the gradients of a trainee into its next weights, and what watches that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.training.gradients import Gradients
from library.training.state.contents import Part
from library.training.trainee.norm_limit import NormLimit
from library.training.update import Gauge


def _nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What learns.

    Attributes:
        parts: what a state keeps of it, by name.
        norm_limit: None unless norms are limited.
        settle: makes the parameters the weights themselves, where they may be copies of them on the device.
            To be called before they are read or changed, once the model has run.
        exact: returns all that is known of a weight, which may be more than the model computes with.
    """

    optimizer: torch.optim.Optimizer
    gradients: Gradients
    parts: Mapping[str, Part]
    gauges: Sequence[Gauge] = ()
    norm_limit: NormLimit | None = None
    settle: Callable[[], None] = _nothing
    exact: Callable[[nn.Parameter], Tensor] = Tensor.detach
