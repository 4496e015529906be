"""How the blocks of a model are run: what each keeps for backward, and whether its weights must come first.

A model asks its runner to run each block and knows no more of the matter:

    x = self.runner.run(block, x, *others)

What a block keeps for backward, from most to least:

- `none`: everything that autograd wants. Before a layer with a LoRA that is not the value of the
  feed-forward's activation, see `networks.lora_op`.
- `selective`: results of products and of attention. What is cheap to make is made again (`nn.recompute`).
- `feed_forward`: the same without the two wide results inside the feed-forward, which are four fifths of it;
  their products are computed again.
- `outputs`: its input, and the results of attention and of the last product of the feed-forward, which take
  far more to compute than others of their size. All other products are computed again.
- `full`: its input. All of it is computed again.
- `offload`: its input, in the computer's memory.

All give the same numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.nn.running.offload import offloaded_checkpoint
from library.nn.running.recompute import Remaking

MODES = ("none", "selective", "feed_forward", "outputs", "full", "offload")
_REMADE = {"selective": "none", "feed_forward": "wide", "outputs": "all"}  # which products, by mode


class Ring(Protocol):
    """Weights that come to the device when it is their turn; see `library.nn.swap.block_swap`."""

    def hold(self, block: nn.Module) -> None:
        """Put the weights of a block on the device until another one is held."""

    def saved_tensors(self, block: nn.Module) -> AbstractContextManager[object]:
        """Return the context to run a held block in when backward will need its weights."""


class BlockRunner:
    """Runs the blocks of one model."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        """`blocks`: all that will be run, in their order."""
        self.blocks = tuple(blocks)
        self.ring: Ring | None = None
        self._modes = dict.fromkeys(self.blocks, "none")

    def keep(self, mode: str, *, every: int = 1, between: str = "none") -> None:
        """Choose a mode for every n-th block, beginning with the first, and one for those between them."""
        for number, block in enumerate(self.blocks):
            self.keep_of(block, mode if number % every == 0 else between)

    def keep_of(self, block: nn.Module, mode: str) -> None:
        """Choose the mode of one block."""
        assert mode in MODES, f"no mode '{mode}'"
        self._modes[block] = mode

    def mode_of(self, block: nn.Module) -> str:
        """Return the mode of a block."""
        return self._modes[block]

    def compile(self, compiled: Callable[[Callable[..., object]], Callable[..., object]]) -> None:
        """Replace the parts of each block that its `compiled_parts` name by what `compiled` makes of them."""
        for block in self.blocks:
            for name in block.compiled_parts:
                setattr(block, name, compiled(getattr(block, name)))

    def run(self, block: nn.Module, x: Tensor, *others: object) -> Tensor:
        """Return block(x, *others)."""
        mode = self._modes[block] if torch.is_grad_enabled() else None
        if mode == "full":
            return checkpoint(self._held, block, x, *others, use_reentrant=False)
        if mode == "offload":
            return offloaded_checkpoint(partial(self._held, block), x, *others)
        with ExitStack() as contexts:
            if mode is not None and self.ring is not None:
                contexts.enter_context(self.ring.saved_tensors(block))
            if mode in _REMADE:
                contexts.enter_context(self._remaking(block, _REMADE[mode]))
            return self._held(block, x, *others)

    def _held(self, block: nn.Module, x: Tensor, *others: object) -> Tensor:
        """Run a block, with its weights in place. A checkpoint comes through here a second time."""
        if self.ring is not None:
            self.ring.hold(block)
        return block(x, *map(_own, others))

    def _remaking(self, block: nn.Module, products: str) -> Remaking:
        prepare = None if self.ring is None else partial(self.ring.hold, block)
        return Remaking(products=products, prepare=prepare)


def _own(other: object) -> object:
    """Return what a block reads beside its stream as a tensor of the block's own, if it gets a gradient.

    So its parts of that gradient are added up before they meet those of other blocks. FSDP does so too, and
    in another order rounding would be another.
    """
    return other.view_as(other) if isinstance(other, Tensor) and other.requires_grad else other
