"""Which kernel computes attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.core.errors import ConfigError
from library.options.group import OptionGroup, option


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(OptionGroup):
    """Attention."""

    attn_mode: str | None = option(
        None,
        "kernel of attention: torch (or sdpa), cudnn (torch's call of cuDNN, for few lengths of captions), "
        "varlen (torch's own for packed batches), flash (the package flash-attn), xformers or sage (their "
        "packages; sage is for drawing only); default: torch, and varlen for batches of several pictures "
        "where it can be had",
        choices=("torch", "sdpa", "cudnn", "varlen", "flash", "xformers", "sage"),
    )
    use_flash_attn: bool = option(False, "the same as --attn_mode flash (requirements-gpu.txt)")
    use_sage_attn: bool = option(False, "the same as --attn_mode sage")

    def __post_init__(self) -> None:
        if self.attn_mode is None and self.use_flash_attn and self.use_sage_attn:
            raise ConfigError("--use_flash_attn and --use_sage_attn are two kinds of attention; choose one.")

    @property
    def attention(self) -> str:
        """The kernel of `library.nn.attention` that the flags ask for."""
        if self.attn_mode is not None:
            return self.attn_mode
        return "flash" if self.use_flash_attn else "sage" if self.use_sage_attn else "auto"

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag that --attn_mode overrules."""
        yield from super().adjustments()
        flags = {"use_flash_attn": "flash", "use_sage_attn": "sage"}
        overruled = [name for name, kernel in flags.items() if self.attn_mode not in (None, kernel)]
        yield from self.without_effect(overruled, f"--attn_mode {self.attn_mode} is given and wins")
