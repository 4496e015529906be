"""A model whose own weights are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from library.nn.transformer import Transformer


class WholeModel(nn.Module):
    """A transformer with all its weights as the trained parameters.

    It has no strength and cannot be switched off, since nothing of the untrained model is left.
    """

    enabled = True
    multiplier = 1.0

    def __init__(self, model: Transformer) -> None:
        """The weights of `model` take gradients from here on."""
        super().__init__()
        self.model = model.requires_grad_(True)

    def named_parameters(self, *args: Any, **settings: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the weights under the model's own names."""
        return self.model.named_parameters(*args, **settings)

    def parameter_groups(self, lr: float) -> list[dict[str, object]]:
        """Return the one optimizer group."""
        return [{"params": list(self.model.parameters()), "lr": lr, "name": "dit"}]

    def parameter_count(self) -> int:
        """Return how many numbers are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters())
