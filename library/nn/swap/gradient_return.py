"""Two-way block swap: the gradients of swapped weights go to the computer's memory as they are made.

    ring = model.runner.ring                      # of a model loaded with swapped blocks
    model.requires_grad_(True)
    returned = GradientReturn(ring)
    for step in ...:
        for micro_batch in ...:
            loss.backward()                       # gradients leave the device meanwhile
        returned.collect()                        # now parameter.data and parameter.grad are on the CPU
        optimizer.step()
        returned.clear()

or, with weights that are stepped in backward:

    returned = GradientReturn(ring, arrived=step)
    loss.backward()                               # calls step(parameter, gradient) for each swapped weight
    returned.collect()                            # waits for the last; before weights are read or used again

Notable facts:
- Autograd sees the device only: when it has a weight's gradient, the gradient is taken from it, and the copy
  is queued behind the computation that made it. `parameter.grad` is None again.
- The device holds gradients until they are copied, and at most as many as the largest block has. What would
  be more waits, on the device, for the oldest copies.
- Weights that are stepped in backward are so by a thread beside it: backward queues the GPU's work, and must
  not stand still while the CPU computes. Where the CPU does both, it does one after the other.
- The optimizer changes master copies. What the ring has copied of them until then, perhaps ahead for the next
  step, is stale: `collect` takes it away from the ring, and waits for copies that still read the masters.
  After the step `clear` has the ring fetch what the next one begins with.
- A weight is stepped in backward when all that its gradient is made of has been computed, and where it
  was used it was read before its gradient was complete. What is computed again for others still reads the
  ring's room, which keeps the weight as it was. So each block runs once in a forward pass, or it is an error.
- Another gradient of a weight, of a second micro-batch, is added by the CPU, which rounds as the device does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from library.nn.swap.block_swap import BlockSwap
from library.nn.swap.swapped_weights import Layout, page_locked

UNDER_WAY = 4  # gradients that are on their way home to a thread, or there and not used up yet

Step = Callable[[nn.Parameter, Tensor], None]


@dataclass(frozen=True)
class _Addition:
    """A gradient that is on its way, and what it will be added to."""

    total: Tensor
    part: Tensor
    copied: object


class GradientReturn:
    """Takes the gradients of a ring's weights home."""

    def __init__(self, ring: BlockSwap, *, arrived: Step | None = None, beside: bool | None = None) -> None:
        """Watch those weights of the ring that are trained by now.

        Args:
            arrived: called with each weight whose gradient is complete, and the gradient. Both are on the
                CPU; it may change the weight in its place, and the gradient, which is then forgotten. What
                it raises comes out of backward or of `collect`. Else gradients stay until `clear`.
            beside: call it in a thread of its own, with one weight after the other, while backward goes on.
                By default where backward is not the CPU's work.

        Raises:
            ResourceError: the ring uses page-locked memory, and there is not enough for the gradients.
        """
        blocks = ring.trained()
        self._ring, self._arrived = ring, arrived
        sizes = [sum(parameter.nbytes for parameter in block) for block in blocks]
        self._leaving = _Leaving(ring, most=0 if arrived else max(sizes, default=0))
        wanted = ring.device.type != "cpu" if beside is None else beside
        self._thread = _thread(ring.device) if arrived and wanted else None
        self._under_way: deque[Future[None]] = deque()  # steps of weights
        self._sent = 0  # gradients to be used in backward
        self._parameters = [parameter for block in blocks for parameter in block]
        self._totals = {} if arrived else _memory_like(blocks, pinned=ring.pinned)
        self._here: set[nn.Parameter] = set()  # those with a gradient of this step
        self._stagings: list[Tensor] = []
        self._adding: _Addition | None = None
        self._handles = [p.register_post_accumulate_grad_hook(self._take) for p in self._parameters]

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The weights whose gradients come home, in the order of the blocks."""
        return self._parameters

    @property
    def beside(self) -> bool:
        """Whether weights are stepped in a thread beside backward."""
        return self._thread is not None

    def collect(self) -> None:
        """Wait for the gradients of this step, after its last backward.

        Then all swapped weights are their master copies, which may be changed, and those that have a gradient
        have it in `grad`, on the CPU; or they have been stepped.
        """
        self._await_steps(0)
        self._add_up()
        self._leaving.finish()
        self._ring.bring_home()
        for parameter in self._here:
            parameter.grad = self._totals[parameter]

    def clear(self) -> None:
        """Forget the gradients, after the step or one that was broken off; their memory is kept.

        What the next step will begin with is fetched. Who changes weights before then, says so to the ring.
        """
        self._await_steps(0)
        self._adding = None
        self._leaving.finish()
        self._ring.bring_home()  # as `collect` did, if the step came that far
        for parameter in self._parameters:
            parameter.grad = None
        self._here.clear()
        self._ring.fetch_ahead()

    def close(self) -> None:
        """Watch no more: gradients stay where autograd makes them."""
        for handle in self._handles:
            handle.remove()
        if self._thread is not None:
            self._thread.shutdown()

    def _take(self, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if self._arrived is not None:
            self._hand_over(parameter, gradient, self._arrived)
        elif parameter in self._here:
            self._add(gradient, self._totals[parameter])
        else:
            self._here.add(parameter)
            self._leaving.send(gradient, self._totals[parameter])

    def _hand_over(self, parameter: nn.Parameter, gradient: Tensor, arrived: Step) -> None:
        """Send a gradient home and have its weight stepped there."""
        self._await_steps(UNDER_WAY - 1)  # then the oldest gradient's memory is free
        home = self._staging(self._sent % UNDER_WAY if self._thread else 0, gradient)
        self._sent += 1
        ends = [self._leaving.send(gradient, home), *self._ring.take_home(parameter)]
        step = partial(self._step, parameter, home, ends, arrived)
        if self._thread is not None:
            self._under_way.append(self._thread.submit(step))
        else:
            self._leaving.finish()
            step()

    def _step(self, parameter: nn.Parameter, home: Tensor, ends: Sequence[object], arrived: Step) -> None:
        """Use a gradient up, once it and what else is copied of its block is where it goes to."""
        for end in ends:
            self._ring.copier.finish(end)
        arrived(parameter, home)

    def _await_steps(self, most: int) -> None:
        """Wait until so many steps at most are under way; raise what one of them raised."""
        while len(self._under_way) > most:
            self._under_way.popleft().result()

    def _add(self, gradient: Tensor, total: Tensor) -> None:
        """Let a gradient go where one is already; meanwhile the one before it is added."""
        other = self._adding is not None and self._adding.part.data_ptr() == self._staging(0).data_ptr()
        part = self._staging(int(other), gradient)
        copied = self._leaving.send(gradient, part)
        self._add_up()
        self._adding = _Addition(total, part, copied)

    def _add_up(self) -> None:
        if self._adding is not None:
            self._ring.copier.finish(self._adding.copied)  # and so for the first gradient, which came before
            self._adding.total.add_(self._adding.part)
            self._adding = None

    def _staging(self, number: int, like: Tensor | None = None) -> Tensor:
        """Return memory of the computer for a gradient that does not stay."""
        while len(self._stagings) <= number:
            size = max(parameter.nbytes for parameter in self._parameters)
            self._stagings += _memory([size], pinned=self._ring.pinned)
        memory = self._stagings[number]
        return memory if like is None else Layout([like]).views(memory)[0]


class _Leaving:
    """Gradients that are on the device until copies of them are done; at most `most` bytes."""

    def __init__(self, ring: BlockSwap, *, most: int) -> None:
        self._copier = ring.copier
        self._most, self._bytes = most, 0
        self._queue: deque[tuple[Tensor, object]] = deque()

    def send(self, gradient: Tensor, home: Tensor) -> object:
        """Start copying a gradient that has just been made; return the end of the copy."""
        while self._queue and self._bytes + gradient.nbytes > self._most:
            oldest, copied = self._queue.popleft()
            self._copier.await_copies(copied)  # then its memory can be used again by what is computed next
            self._bytes -= oldest.nbytes
            del oldest
        copied = self._copier.copy_back([(home, gradient)], self._copier.mark())
        self._queue.append((gradient, copied))
        self._bytes += gradient.nbytes
        return copied

    def finish(self) -> None:
        """Wait until all gradients are home."""
        if self._queue:
            self._copier.finish(self._queue[-1][1])
        self._queue.clear()
        self._bytes = 0


def _thread(device: torch.device) -> ThreadPoolExecutor:
    """Return a thread that waits for copies. Left on the first GPU, where each begins, it could take memory
    of that one too.
    """
    if device.type != "cuda":
        return ThreadPoolExecutor(1, thread_name_prefix="steps")
    number = torch.cuda.current_device() if device.index is None else device.index
    return ThreadPoolExecutor(
        1, thread_name_prefix="steps", initializer=torch.cuda.set_device, initargs=(number,)
    )


def _memory_like(blocks: Sequence[Sequence[nn.Parameter]], *, pinned: bool) -> dict[nn.Parameter, Tensor]:
    """Return memory of the computer for a gradient of each of these weights."""
    layouts = [Layout(block) for block in blocks]
    pieces = _memory([layout.size for layout in layouts], pinned=pinned)
    return {
        parameter: view
        for block, layout, piece in zip(blocks, layouts, pieces, strict=True)
        for parameter, view in zip(block, layout.views(piece), strict=True)
    }


def _memory(sizes: Sequence[int], *, pinned: bool) -> list[Tensor]:
    return page_locked(sizes) if pinned else [torch.empty(size, dtype=torch.uint8) for size in sizes]
