"""What every transformer of this project can do, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import nn

from library.nn.running.runner import BlockRunner


class Transformer(nn.Module, ABC):
    """A network of blocks. `runner` says how they are run."""

    runner: BlockRunner

    @abstractmethod
    def use_attention(self, kernel: str) -> None:
        """Let every block use the named kernel of `library.nn.attention`."""

    @property
    @abstractmethod
    def routed_blocks(self) -> nn.ModuleList:
        """The blocks that image tokens can skip, see `library.nn.running.routing`."""

    @abstractmethod
    def block_flops(self, seen: Sequence[int], image: int, text: int) -> int:
        """Return multiplications and additions of the blocks' products for one picture, forward.

        Products of the timestep alone, which are few, are left out.

        Args:
            seen: image tokens in each of `routed_blocks`. image, text: tokens elsewhere.
        """
