"""What every transformer of this project can do, whatever its family."""

from __future__ import annotations

from torch import nn

from library.nn.runner import BlockRunner


class Transformer(nn.Module):
    """A network of blocks. `runner` says how they are run."""

    runner: BlockRunner

    def use_attention(self, kernel: str) -> None:
        """Let every block use the named kernel of `library.nn.attention`."""
        raise NotImplementedError
