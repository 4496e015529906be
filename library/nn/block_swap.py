"""Block swap: frozen weights of some blocks wait in the computer's memory, and are copied ahead of use.

Notable facts:
- One way. The master copy never moves and is never written; nothing is copied back.
- A ring of rooms on the device, each for one block: one block is held, meaning that it is in use, and the
  next ones are copied meanwhile, on a queue of their own. A room is free once another block has been held
  after its own: copies into it wait for what was computed until then.
- Which block comes next is remembered from the last time: forward, backward, a preview without backward and a
  backward that ends early all run in the same order again and again. Nothing but speed hangs on it.
- Only weights that the block has when the swap is made are moved, never those of a LoRA put on it later.
- With checkpointing a block is held again when it is computed again, just before its backward. Without it,
  `saved_tensors` remembers which weights backward needs, and holds the block then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from library.core.errors import ResourceError
from library.core.log import logger
from library.nn.copy_streams import Copier, copier_for
from library.options.swap import SwapOptions

_ALIGNMENT = 256  # bytes; as CUDA's allocator aligns, so that no kernel finds its operands placed worse
_GIB = 2**30
_LARGEST_PINNED = 2 * _GIB  # of one allocation of page-locked memory

_log = logger("swap")


def chosen_blocks(blocks: Sequence[nn.Module], options: SwapOptions) -> list[nn.Module]:
    """Return the blocks of a model that the options swap. Raises ConfigError if it has too few."""
    options.check(len(blocks))
    return [blocks[number] for number in spread(len(blocks), options.count)]


def spread(total: int, count: int) -> list[int]:
    """Return which `count` of `total` blocks are swapped: evenly spread, so that copies have time between."""
    return [n for n in range(total) if (n + 1) * count // total > n * count // total]


def device_of_weights(
    model: nn.Module, swapped: Sequence[nn.Module], device: torch.device
) -> Callable[[str], torch.device]:
    """Return the rule by which weights of `model` are loaded, by name: to the CPU, if in a swapped block."""
    names = tuple(f"{name}." for name, module in model.named_modules() if module in set(swapped))
    return lambda name: torch.device("cpu") if name.startswith(names) else device


def make_ring(swapped: Sequence[nn.Module], device: torch.device, options: SwapOptions) -> BlockSwap | None:
    """Return what brings these blocks to `device` as the options say; None if there are none."""
    if not swapped:
        return None
    pinned = options.use_pinned_memory_for_block_swap
    if device.type != "cuda":
        _log.warning("--blocks_to_swap saves memory of a CUDA GPU; on '%s' it only costs time", device)
        if pinned:
            _log.warning("--use_pinned_memory_for_block_swap has no effect: page-locked memory is for CUDA")
        pinned = False
    return BlockSwap(swapped, device, ring_size=options.block_swap_ring_size, pinned=pinned)


def spared_bytes(swapped: Sequence[nn.Module], ring_size: int) -> int:
    """Return how much less of the device's memory the model takes: the swapped weights, less the ring."""
    return sum(_sizes(swapped)) - ring_bytes(swapped, ring_size)


def ring_bytes(swapped: Sequence[nn.Module], ring_size: int) -> int:
    """Return how much of the device's memory the ring takes."""
    sizes = _sizes(swapped)
    return min(ring_size, len(sizes)) * max(sizes, default=0)


def _sizes(swapped: Sequence[nn.Module]) -> list[int]:
    return [_Weights([getattr(*place) for place in _owned_by(block)]).size for block in swapped]


class BlockSwap:
    """Brings the weights of blocks to the device when it is their turn.

    Until the first `hold` weights may be changed or replaced, as merging does; after that they are constant.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device,
        *,
        ring_size: int = 2,
        pinned: bool = False,
        copier: Copier[Any, Any] | None = None,
    ) -> None:
        """Swap `blocks`, in the order in which they run; their weights are on the CPU.

        Args:
            ring_size: how many of them have room on the device; 1 makes every copy a wait.
            pinned: keep the master copies in page-locked memory, which CUDA alone has a use for.
        """
        self._device, self._pinned = device, pinned
        self._numbers = {block: number for number, block in enumerate(blocks)}
        self._owned = [_owned_by(block) for block in blocks]
        self._copier = copier or copier_for(device, page_locked=pinned)
        self._forecast = _Forecast(len(blocks))
        self._ahead = min(ring_size, len(blocks)) - 1
        self._held: int | None = None
        self._weights: list[_Weights] = []  # both of them are there from the first `hold` on
        self._rooms: list[_Room] = []

    def hold(self, block: nn.Module) -> None:
        """Put the weights of `block` on the device for what is computed from now on, until the next `hold`.

        Blocks that are not swapped are none of its business. The next blocks' copies are started.
        """
        number = self._numbers.get(block)
        if number is None or number == self._held:
            return
        if not self._rooms:
            self._start()
        self._held = None  # until all went well: a copy may fail for want of memory
        self._forecast.note(number)
        wanted = [number, *self._forecast.next(self._ahead)]
        computed = self._copier.mark()
        for next_number in wanted:
            self._fetch(next_number, wanted, computed)
        room = self._room_of(number)
        self._copier.await_copies(room.copied)
        self._weights[number].point_into(room.memory)
        self._held = number

    def release(self) -> None:
        """Give the ring's memory back, until the next `hold`. The blocks have their master copies again."""
        for room in self._rooms:
            if room.block is not None:
                self._copier.await_copies(room.copied)
        for weights in self._weights:
            weights.leave()
        self._rooms, self._held = [], None

    def saved_tensors(self, block: nn.Module) -> AbstractContextManager[object]:
        """Return the context to run a held block in when backward will need its weights.

        Autograd then keeps no weight of the block: it is held again when backward comes to it. Not for a
        block that is computed again in backward, because of such contexts only the innermost works.
        """
        number = self._numbers.get(block)
        if number is None:
            return nullcontext()

        def pack(tensor: Tensor) -> Tensor | _SavedWeight:
            memory = self._room_of(number).memory
            if tensor.untyped_storage().data_ptr() != memory.data_ptr():
                return tensor.detach()
            return _SavedWeight(tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

        def unpack(packed: Tensor | _SavedWeight) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            self.hold(block)
            return packed.found_in(self._room_of(number).memory)

        return saved_tensors_hooks(pack, unpack)

    def move_others(self, model: nn.Module, device: torch.device | str) -> None:
        """Move all of `model` but the blocks' weights, which wait where they are; the ring is given back."""
        self.release()
        waiting = {id(getattr(*place)) for owned in self._owned for place in owned}
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in waiting:
                tensor.data = tensor.data.to(device)

    def _start(self) -> None:
        """Make the ring; the first time, take the weights as they are now for the master copies."""
        first = not self._weights
        if first:
            self._weights = [_Weights([getattr(*place) for place in owned]) for owned in self._owned]
            if self._pinned:
                _pin(self._weights)
        size = max(weights.size for weights in self._weights)
        self._rooms = [_Room(self._copier.room(size)) for _ in range(self._ahead + 1)]
        if first:
            _log.info(
                "weights of %d blocks (%.2f GiB) wait in %smemory of the computer; %d have room on %s "
                "(%.2f GiB)",
                *(len(self._weights), sum(weights.size for weights in self._weights) / _GIB),
                "page-locked " if self._pinned else "",
                *(len(self._rooms), self._device, len(self._rooms) * size / _GIB),
            )

    def _room_of(self, number: int) -> _Room:
        return next(room for room in self._rooms if room.block == number)

    def _fetch(self, number: int, wanted: Sequence[int], computed: object) -> None:
        """Start copying a block, unless it is there, into a room that no wanted block has."""
        if any(room.block == number for room in self._rooms):
            return
        room = next(room for room in self._rooms if room.block not in wanted)
        if room.block is not None:
            self._weights[room.block].point_to_masters()
            room.block = None
        room.copied = self._copier.copy(self._weights[number].copies_into(room.memory), computed)
        room.block = number


@dataclass
class _Room:
    """Memory of the device, and whose weights are in it, or will be once `copied`."""

    memory: Tensor
    block: int | None = None
    copied: object = None


@dataclass(frozen=True)
class _SavedWeight:
    """A view of a held block's weights, wherever in the ring the block will be."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def found_in(self, memory: Tensor) -> Tensor:
        """Return the view in a room's memory."""
        return memory.view(self.dtype).as_strided(self.size, self.stride, self.offset)


class _Weights:
    """The weights of a block: the very tensors that the block computes with, and their master copies."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._masters = [tensor.data for tensor in tensors]
        self._flat: Tensor | None = None  # the masters in one piece, laid out as in a room
        self._views: dict[int, list[Tensor]] = {}  # by the address of the room that they are in
        self._offsets = []
        self.size = 0
        for tensor in tensors:
            self._offsets.append(self.size)
            self.size += _aligned(tensor.numel() * tensor.element_size())

    def views(self, memory: Tensor) -> list[Tensor]:
        """Return where the weights are in a room or in a flat master."""
        views = self._views.get(memory.data_ptr())
        if views is None:
            views = self._views[memory.data_ptr()] = self._make_views(memory)
        return views

    def _make_views(self, memory: Tensor) -> list[Tensor]:
        return [
            memory[offset : offset + master.numel() * master.element_size()]
            .view(master.dtype)
            .view(master.shape)
            for master, offset in zip(self._masters, self._offsets, strict=True)
        ]

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

    def leave(self) -> None:
        """Let the block have its master copies, and forget the rooms: their memory is to be freed."""
        self.point_to_masters()
        self._views.clear()

    def _point_to(self, places: Sequence[Tensor]) -> None:
        for tensor, place in zip(self._tensors, places, strict=True):
            tensor.data = place


@dataclass
class _Forecast:
    """Which blocks come next: those that came after the last two the last time.

    Two tell the way: forward or backward. What has not been seen yet goes on in the same direction.
    """

    blocks: int
    _last: tuple[int, int] = (-1, -1)
    _after: dict[tuple[int, int], int] = field(default_factory=dict)

    def note(self, number: int) -> None:
        """Remember that this block comes now."""
        self._after[self._last] = number
        self._last = (self._last[1], number)

    def next(self, count: int) -> list[int]:
        """Return up to `count` blocks, each once and without the present one, that will probably come."""
        found: list[int] = []
        for number in self._walk():
            if len(found) == count:
                break
            if number not in (self._last[1], *found):
                found.append(number)
        return found

    def _walk(self) -> Iterator[int]:
        before, now = self._last
        for _ in range(2 * self.blocks):
            guess = now + 1 if before < now else now - 1
            before, now = now, self._after.get((before, now), guess)
            if not 0 <= now < self.blocks:
                return
            yield now


def _owned_by(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return module and name of each frozen weight and buffer of a block, in an order of its own."""
    return [
        (module, name)
        for module in block.modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if not tensor.requires_grad
    ]


def _pin(blocks: Sequence[_Weights]) -> None:
    """Move the master copies into page-locked memory.

    torch rounds such memory up to a power of two, so several blocks share a piece that is nearly full.

    Raises:
        ResourceError: the system does not give so much.
    """
    waiting = list(blocks)
    while waiting:
        group = waiting[: _fullest([weights.size for weights in waiting])]
        del waiting[: len(group)]
        memory = _page_locked(sum(weights.size for weights in group))
        for weights, part in zip(group, memory.split([weights.size for weights in group]), strict=True):
            weights.make_flat(part)


def _page_locked(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise ResourceError(
            f"The system does not give another {size / _GIB:.2f} GiB of page-locked memory "
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
