"""How many blocks of the model wait in the computer's memory until it is their turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.core.errors import ConfigError
from library.options.group import OptionGroup, option


@dataclass(frozen=True, kw_only=True)
class SwapOptions(OptionGroup):
    """Block swap.

    Blocks of the model whose weights wait in the computer's memory, and are copied to the GPU just before
    they are used; see docs/memory.md.
    """

    blocks_to_swap: int | None = option(
        None, "keep the weights of N blocks, spread over the model, in the computer's memory"
    )
    use_pinned_memory_for_block_swap: bool = option(
        False, "keep them in page-locked memory: the copies are faster, and that memory cannot be swapped out"
    )
    block_swap_ring_size: int = option(
        2, "how many of these blocks have room on the GPU: one in use, the others copied ahead"
    )

    def __post_init__(self) -> None:
        if self.blocks_to_swap is not None and self.blocks_to_swap < 0:
            raise ConfigError(f"--blocks_to_swap is {self.blocks_to_swap}; it must be 0 or more.")
        if self.block_swap_ring_size < 1:
            raise ConfigError(
                f"--block_swap_ring_size is {self.block_swap_ring_size}; it must be 1 or more, and 2 for "
                f"copies while the model computes."
            )

    @property
    def count(self) -> int:
        """How many blocks are swapped."""
        return self.blocks_to_swap or 0

    def check(self, blocks: int) -> None:
        """Raise ConfigError if the model, which has so many blocks, has too few."""
        if self.count > blocks:
            raise ConfigError(f"--blocks_to_swap is {self.count}, but the model has {blocks} blocks.")

    def adjustments(self) -> Iterator[str]:
        """Tell of swapping that swaps nothing, or saves nothing."""
        yield from super().adjustments()
        if self.count == 0:
            names = ("use_pinned_memory_for_block_swap", "block_swap_ring_size")
            yield from self.without_effect(names, "no block is swapped without --blocks_to_swap")
        elif self.count <= self.block_swap_ring_size:
            yield (
                f"--blocks_to_swap {self.count} saves no memory: --block_swap_ring_size leaves room for "
                f"{self.block_swap_ring_size} blocks on the GPU"
            )
