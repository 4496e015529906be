"""Linear layers that read the same input (queries, keys and values; two halves of a feed-forward)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Joinable(nn.Module):
    """A layer that can be computed in one operation with others that read the same input."""

    def with_others(self, x: Tensor, others: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """Return what this layer and then `others` make of x, whether or not they can be joined."""
        raise NotImplementedError


def together(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Return what each layer makes of x."""
    first, *others = layers
    if isinstance(first, Joinable):
        return first.with_others(x, others)
    return tuple(layer(x) for layer in layers)
