"""Linear layers in one operation with what is next to them: others that read the same input (queries, keys
and values; two halves of a feed-forward), or the activation before them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.nn.activations import Activation


class Joinable(nn.Module):
    """A layer that can be computed in one operation with its neighbours."""

    def with_others(self, x: Tensor, others: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """Return what this layer and then `others` make of x, whether or not they can be joined."""
        raise NotImplementedError

    def after(self, activation: Activation, inputs: Sequence[Tensor]) -> Tensor:
        """Return what this layer makes of an activation's value, whether or not they can be joined."""
        raise NotImplementedError


def together(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Return what each layer makes of x."""
    first, *others = layers
    if isinstance(first, Joinable):
        return first.with_others(x, others)
    return tuple(layer(x) for layer in layers)


def activated(activation: Activation, inputs: Sequence[Tensor], layer: nn.Module) -> Tensor:
    """Return what a layer makes of an activation's value. The compiler joins them in its own way."""
    if isinstance(layer, Joinable) and not torch.compiler.is_compiling():
        return layer.after(activation, inputs)
    return layer(activation.value(*inputs))
