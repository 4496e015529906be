"""Sizes of a network read off the shapes in its weight file. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from library.core.checkpoint_files import Checkpoint
from library.core.errors import CheckpointError
from library.models.checkpoint_kind import shard_hint

NamedShape = tuple[str, tuple[int, ...]]
Naming = Callable[[str], tuple[str, ...]]


def same_name(name: str) -> tuple[str, ...]:
    """Return the name of a tensor in a file that names it as the network does."""
    return (name,)


def linear_shapes(name: str, rows: int, columns: int) -> Iterator[NamedShape]:
    """Yield weight and bias of a linear layer."""
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


class Shapes:
    """Shapes of a checkpoint's tensors by the network's own names. `what` is the network, for messages."""

    def __init__(self, checkpoint: Checkpoint, what: str, names: Naming = same_name) -> None:
        self._checkpoint = checkpoint
        self._what = what
        self._names = names

    def rows(self, name: str) -> int:
        """First dimension; summed over the parts that a fused tensor is stored in."""
        return sum(self._shape(part, 0) for part in self._names(name))

    def columns(self, name: str) -> int:
        """Second dimension of a matrix."""
        return self._shape(self._names(name)[0], 1)

    def count(self, blocks: str) -> int:
        """How many blocks a list has: the highest number that occurs, so that a gap is found out later."""
        found = (re.match(rf"{blocks}\.(\d+)\.", name) for name in self._checkpoint.tensors)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def _shape(self, name: str, dimension: int) -> int:
        if name not in self._checkpoint.tensors:
            raise CheckpointError(
                f"{self._checkpoint.path} is an incomplete {self._what}: it lacks '{name}'."
                f"{shard_hint(self._checkpoint)}"
            )
        shape = self._checkpoint.shape(name)
        if len(shape) <= dimension or not shape[dimension]:
            raise CheckpointError(f"{self._checkpoint.path}: '{name}' has the impossible shape {shape}.")
        return shape[dimension]


def check_axes(checkpoint: Checkpoint, axes_dims: tuple[int, ...], head_dim: int) -> None:
    """Raise CheckpointError unless the position axes divide up the features of a head."""
    if sum(axes_dims) != head_dim or any(dim < 2 or dim % 2 for dim in axes_dims):
        raise CheckpointError(
            f"{checkpoint.path}: axes_dims {list(axes_dims)} must be even and add up to {head_dim}, the "
            f"features of a head."
        )
