"""Modes that a model or a trainee is in for a while, to be looked at or asked, and then as before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from library.training.trainee.kind import Trainee


@contextmanager
def eval_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put modules and all their parts into eval mode; afterwards each part is in its own mode again."""
    parts = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in parts.items():
            part.training = training


@contextmanager
def switched_off(trainee: Trainee) -> Iterator[None]:
    """Leave the network out of its model for a while."""
    trainee.enabled = False
    try:
        yield
    finally:
        trainee.enabled = True
