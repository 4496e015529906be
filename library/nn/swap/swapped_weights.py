"""Weights of swapped blocks: how they lie in memory, their master copies, page-locked memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from library.core.errors import ResourceError

GIB = 2**30
_ALIGNMENT = 256  # bytes; as CUDA's allocator aligns, so that no kernel finds its operands placed worse
_LARGEST_PINNED = 2 * GIB  # of one allocation of page-locked memory


class Layout:
    """How tensors lie in one piece of memory, one after another. `size`: bytes of it."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._forms: list[tuple[int, int, torch.dtype, torch.Size]] = []
        self.size = 0
        for tensor in tensors:
            end = self.size + tensor.nbytes
            self._forms.append((self.size, end, tensor.dtype, tensor.shape))
            self.size += _aligned(tensor.nbytes)

    def views(self, memory: Tensor) -> list[Tensor]:
        """Return where the tensors are in (size,) bytes or more."""
        return [memory[begin:end].view(dtype).view(shape) for begin, end, dtype, shape in self._forms]


class SwappedWeights:
    """The weights of a block: the very tensors that the block computes with, and their master copies."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._masters = [tensor.data for tensor in tensors]
        self._flat: Tensor | None = None  # the masters in one piece, laid out as in a room
        self._layout = Layout(tensors)
        self._views: dict[int, list[Tensor]] = {}  # by the address of the room that they are in
        self.size = self._layout.size

    def views(self, memory: Tensor) -> list[Tensor]:
        """Return where the weights are in a room or in a flat master."""
        views = self._views.get(memory.data_ptr())
        if views is None:
            views = self._views[memory.data_ptr()] = self._layout.views(memory)
        return views

    def make_flat(self, memory: Tensor) -> None:
        """Move the master copies into (size,) bytes."""
        views = self.views(memory)
        for view, master in zip(views, self._masters, strict=True):
            view.copy_(master)
        self._masters, self._flat = views, memory
        self.point_to_masters()

    def copies_into(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the targets and sources of copies that bring the weights into a room."""
        if self._flat is not None:
            return [(memory[: self.size], self._flat)]
        return list(zip(self.views(memory), self._masters, strict=True))

    def point_into(self, memory: Tensor) -> None:
        """Let the block compute with the copies in a room."""
        self._point_to(self.views(memory))

    def point_to_masters(self) -> None:
        """Let the block have its master copies, as whoever looks at its weights expects."""
        self._point_to(self._masters)

    def take_home(self, wanted: nn.Parameter) -> bool:
        """Let the block have the master copy of one of its weights; return whether it is the block's."""
        for tensor, master in zip(self._tensors, self._masters, strict=True):
            if tensor is wanted:
                tensor.data = master
                return True
        return False

    def versions(self) -> list[int]:
        """Return what torch counts up for each weight when it is changed, but for ways past autograd."""
        return [tensor._version for tensor in self._tensors]

    def are_home(self) -> bool:
        """Return whether all weights are their master copies: nobody has given them other memory."""
        pairs = zip(self._tensors, self._masters, strict=True)
        return all(tensor.data_ptr() == master.data_ptr() for tensor, master in pairs)

    def leave(self) -> None:
        """Let the block have its master copies, and forget the rooms: their memory is to be freed."""
        self.point_to_masters()
        self._views.clear()

    def _point_to(self, places: Sequence[Tensor]) -> None:
        for tensor, place in zip(self._tensors, places, strict=True):
            tensor.data = place


def owned_by(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return module and name of each frozen weight and buffer of a block, in an order of its own."""
    return [
        (module, name)
        for module in block.modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if not tensor.requires_grad
    ]


def pin(blocks: Sequence[SwappedWeights]) -> None:
    """Move the master copies into page-locked memory. Raises ResourceError, see `page_locked`."""
    waiting = list(blocks)
    while waiting:  # piece by piece, so that what has been moved is no longer there twice
        group = waiting[: _fullest([weights.size for weights in waiting])]
        del waiting[: len(group)]
        for weights, part in zip(group, page_locked([weights.size for weights in group]), strict=True):
            weights.make_flat(part)


def page_locked(sizes: Sequence[int]) -> list[Tensor]:
    """Return page-locked memory of so many bytes each.

    torch rounds such memory up to a power of two, so several share a piece that is nearly full.

    Raises:
        ResourceError: the system does not give so much.
    """
    parts: list[Tensor] = []
    while len(parts) < len(sizes):
        waiting = sizes[len(parts) :]
        group = waiting[: _fullest(waiting)]
        parts += _locked(sum(group)).split(list(group))
    return parts


def _locked(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise ResourceError(
            f"The system does not give another {size / GIB:.2f} GiB of page-locked memory "
            f"({str(error).splitlines()[0]}): leave out --use_pinned_memory_for_block_swap, or swap fewer "
            f"blocks with --blocks_to_swap."
        ) from error


def _fullest(sizes: Sequence[int]) -> int:
    """Return how many of the first blocks fill a power of two best; more, where that is as good."""
    best, fill, total = 1, 0.0, 0
    for count, size in enumerate(sizes, start=1):
        total += size
        power = 1 << (total - 1).bit_length()
        if power > _LARGEST_PINNED:
            break
        if total / power >= fill:
            best, fill = count, total / power
    return best


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
