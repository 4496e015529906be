"""Block swap: weights of some blocks wait in the computer's memory, and are copied ahead of use.

Notable facts:
- The master copies never move, and copies into the rooms are all that this file does: frozen weights need no
  more. Where weights are trained, `gradient_return` takes their gradients the other way, the optimizer
  changes the masters, and what is in the rooms counts no longer.
- A ring of rooms on the device, each for one block: one block is held, meaning that it is in use, and the
  next ones are copied meanwhile, on a queue of their own. A room is free once another block has been held
  after its own: copies into it wait for what was computed until then.
- Which block comes next is remembered from the last time: forward, backward, a preview without backward and a
  backward that ends early all run in the same order again and again. Nothing but speed hangs on it.
- Only weights that the block has, frozen, when the swap is made are moved, never those of a LoRA put on it
  later. They may be trained from then on.
- With checkpointing a block is held again when it is computed again, just before its backward. Without it,
  `saved_tensors` remembers which weights backward needs, and holds the block then.

Whoever reads or changes weights outside of the blocks (an optimizer, an average, a file that is written)
calls `bring_home` first. Then all weights are their master copies, and the next `hold` copies them anew.
Who has changed them calls `fetch_ahead`, if that takes a while yet, and `bring_home` before the next change.
Changes go into the memory that is there: a weight that is given other memory is found out by `hold`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from library.core.log import logger
from library.nn.swap.copy_streams import Copier, copier_for
from library.nn.swap.swapped_weights import GIB, Layout, SwappedWeights, owned_by, pin
from library.options.swap import SwapOptions

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
    return [Layout(getattr(*place) for place in owned_by(block)).size for block in swapped]


class BlockSwap:
    """Brings the weights of blocks to the device when it is their turn.

    Until the first `hold` weights may be changed or replaced, as merging does; after that they may be
    changed where they are, between `bring_home` and the next `hold`.
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
        self.device, self.pinned = device, pinned
        self._numbers = {block: number for number, block in enumerate(blocks)}
        self._owned = [owned_by(block) for block in blocks]
        self.copier = copier or copier_for(device, page_locked=pinned)
        self._forecast = _Forecast(len(blocks))
        self._ahead = min(ring_size, len(blocks)) - 1
        self._held: int | None = None
        self._changed: set[int] = set()  # blocks with weights that were changed while they were held
        self._weights: list[SwappedWeights] = []  # both of them are there from the first `hold` on
        self._rooms: list[_Room] = []

    def hold(self, block: nn.Module) -> None:
        """Put the weights of `block` on the device for what is computed from now on, until the next `hold`.

        Blocks that are not swapped are none of its business. The next blocks' copies are started.
        """
        number = self._numbers.get(block)
        if number is None or number == self._held:
            return
        assert number not in self._changed, "a block is needed again whose weights have been changed"
        if not self._rooms:
            self._start()
        self._held = None  # until all went well: a copy may fail for want of memory
        self._forecast.note(number)
        coming = self._forecast.next(self._ahead, but=number)
        wanted = [number, *(next_number for next_number in coming if next_number not in self._changed)]
        computed = self.copier.mark()
        for next_number in wanted:
            self._fetch(next_number, wanted, computed)
        room = self._room_of(number)
        assert room.versions == self._weights[number].versions(), "a weight was changed after it was copied"
        self.copier.await_copies(room.copied)
        self._weights[number].point_into(room.memory)
        self._held = number

    def trained(self) -> list[list[nn.Parameter]]:
        """Return those weights of each block that are trained by now, in the order of the blocks."""
        return [[tensor for tensor in tensors if tensor.requires_grad] for tensors in self._tensors()]

    def bring_home(self) -> None:
        """Give the blocks their master copies back: from now on they may be read and changed.

        The program waits for copies that are still on their way. What is in the rooms counts no longer. It
        costs nothing when no block has been held since the last time.
        """
        for room in self._rooms:
            if room.block is not None:
                self.copier.finish(room.copied)
                self._weights[room.block].point_to_masters()
                room.block = None
        self._held = None
        self._changed.clear()

    def fetch_ahead(self) -> None:
        """Start copying the blocks that will probably be held first from now on.

        They have their master copies until then. The first time nothing is known of them.
        """
        if not self._rooms:
            return
        wanted = self._forecast.next(len(self._rooms))
        computed = self.copier.mark()
        for number in wanted:
            self._fetch(number, wanted, computed)

    def take_home(self, weight: nn.Parameter) -> list[object]:
        """Give a block the master copy of one of its weights.

        It may be changed when the copies whose ends are returned are done: they may read it yet. For a weight
        that nothing will compute with any more, while others of its block are still in use: what is in the
        room stays as it is for them. The block may be held again only after `bring_home`.
        """
        number = next(n for n, weights in enumerate(self._weights) if weights.take_home(weight))
        self._changed.add(number)
        return [room.copied for room in self._rooms if room.block == number]

    def release(self) -> None:
        """Give the ring's memory back, until the next `hold`. The blocks have their master copies again."""
        self.bring_home()
        for weights in self._weights:
            weights.leave()
        self._rooms = []

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
        waiting = {id(tensor) for tensors in self._tensors() for tensor in tensors}
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in waiting:
                tensor.data = tensor.data.to(device)

    def _start(self) -> None:
        """Make the ring; the first time, take the weights as they are now for the master copies."""
        first = not self._weights
        if first:
            self._weights = [SwappedWeights(tensors) for tensors in self._tensors()]
            if self.pinned:
                pin(self._weights)
        size = max(weights.size for weights in self._weights)
        self._rooms = [_Room(self.copier.room(size)) for _ in range(self._ahead + 1)]
        if first:
            _log.info(
                "weights of %d blocks (%.2f GiB) wait in %smemory of the computer; %d have room on %s "
                "(%.2f GiB)",
                *(len(self._weights), sum(weights.size for weights in self._weights) / GIB),
                "page-locked " if self.pinned else "",
                *(len(self._rooms), self.device, len(self._rooms) * size / GIB),
            )

    def _tensors(self) -> list[list[Tensor]]:
        return [[getattr(*place) for place in owned] for owned in self._owned]

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
        weights = self._weights[number]
        assert weights.are_home(), "a swapped weight was given other memory, which would not be copied"
        room.copied = self.copier.copy(weights.copies_into(room.memory), computed)
        room.block, room.versions = number, weights.versions()


@dataclass
class _Room:
    """Memory of the device, and whose weights are in it, or will be once `copied`; `versions` of them."""

    memory: Tensor
    block: int | None = None
    copied: object = None
    versions: object = None


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

    def next(self, count: int, *, but: int | None = None) -> list[int]:
        """Return up to `count` blocks, each once and without one that is there, that will probably come."""
        found: list[int] = []
        for number in self._walk():
            if len(found) == count:
                break
            if number not in (but, *found):
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
