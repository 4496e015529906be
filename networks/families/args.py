"""What `--network_args` may say to the LoRA of any family, and what follows for a layer. Torch-free.

The meaning of each argument is told in docs/lora.md.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from library.core.errors import ConfigError
from networks.network_args import (
    arg,
    to_bool,
    to_pattern_table,
    to_patterns,
    to_positive,
    to_positive_list,
    to_probability,
    to_rank,
    to_rank_list,
    to_start,
)

Patterns = tuple[re.Pattern[str], ...]


@dataclass(frozen=True, kw_only=True)
class LoRAArgs(ABC):
    """What `--network_args` may say. None: as `network_dim`, `network_alpha` and the learning rate say.

    `BLOCKS`: the list of blocks that `block_dims`, `block_alphas` and `block_lrs` have a value for each of.
    """

    BLOCKS: ClassVar[str]

    block_dims: tuple[int, ...] | None = arg(None, to_rank_list)
    block_alphas: tuple[float, ...] | None = arg(None, to_positive_list)
    block_lrs: tuple[float, ...] | None = arg(None, to_positive_list)
    network_reg_dims: tuple[tuple[re.Pattern[str], int], ...] = arg((), to_pattern_table(to_rank))
    network_reg_lrs: tuple[tuple[re.Pattern[str], float], ...] = arg((), to_pattern_table(to_positive))
    exclude_patterns: Patterns = arg((), to_patterns)
    include_patterns: Patterns = arg((), to_patterns)
    rs_lora: bool = arg(False, to_bool, "use_rslora")
    dora_wd: bool = arg(False, to_bool, "use_dora", "weight_decompose")
    wd_on_output: bool = arg(False, to_bool, "wd_on_out")
    init: str = arg("kaiming", to_start, "init_lora_weights")
    rank_dropout: float = arg(0.0, to_probability)
    module_dropout: float = arg(0.0, to_probability)
    loraplus_lr_ratio: float = arg(1.0, to_positive)
    loraplus_unet_lr_ratio: float | None = arg(None, to_positive)
    loraplus_text_encoder_lr_ratio: float | None = arg(None, to_positive)
    verbose: bool = arg(False, to_bool)
    conv_dim: int | None = arg(None, to_rank)  # of other models: these have no convolutions
    conv_alpha: float | None = arg(None, to_positive)

    @abstractmethod
    def rank_by_place(self, path: str, network_dim: int) -> int:
        """Return the rank that follows from where the layer at `path` is, before patterns have a say."""

    def widths_of(self, path: str, in_features: int, out_features: int) -> tuple[int, ...]:
        """Return the features of the parts of a layer's output that have a LoRA each; () for one."""
        return ()

    def rank_of(self, path: str, network_dim: int) -> int:
        """Return the rank of the LoRA on the linear layer at `path`; 0 for none."""
        if not self._chosen(path):
            return 0
        named = _first_match(self.network_reg_dims, path)
        return self.rank_by_place(path, network_dim) if named is None else named

    def alpha_of(self, path: str, network_alpha: float | None, rank: int) -> float:
        """Return the alpha that divided by the rank is the scale of the LoRA at `path`."""
        return self.scaled_alpha(self.of_block(self.block_alphas, path) or network_alpha, rank)

    def lr_of(self, path: str) -> float | None:
        """Return the learning rate of the layer at `path` where it has one of its own."""
        named = _first_match(self.network_reg_lrs, path)
        return self.of_block(self.block_lrs, path) if named is None else named

    def check_layers(self, paths: Iterable[str]) -> None:
        """Raise ConfigError for patterns that match none of a model's layers, and lists of another length."""
        paths = list(paths)
        tables = {
            "network_reg_dims": [pattern for pattern, _ in self.network_reg_dims],
            "network_reg_lrs": [pattern for pattern, _ in self.network_reg_lrs],
            "exclude_patterns": self.exclude_patterns,
            "include_patterns": self.include_patterns,
        }
        for key, patterns in tables.items():
            for pattern in patterns:
                if not any(pattern.fullmatch(path) for path in paths):
                    raise ConfigError(
                        f"--network_args {key}: '{pattern.pattern}' matches no layer of the model. It must "
                        f"match the whole of a path such as {', '.join(paths[:1] + paths[-1:])}."
                    )
        blocks = len({path.split(".")[1] for path in paths if path.startswith(f"{self.BLOCKS}.")})
        for key in ("block_dims", "block_alphas", "block_lrs"):
            values = getattr(self, key)
            if values is not None and len(values) != blocks:
                raise ConfigError(
                    f"--network_args {key} has {len(values)} values, but the model has {blocks} blocks in "
                    f"'{self.BLOCKS}'."
                )

    @property
    def dora(self) -> str | None:
        """Whether there are DoRAs, and of which features they have magnitudes: "input" or "output"."""
        return None if not self.dora_wd else "output" if self.wd_on_output else "input"

    @property
    def lr_ratio(self) -> float:
        """How much faster `up` matrices of the DiT learn than `down` ones (LoRA+)."""
        return self.loraplus_unet_lr_ratio or self.loraplus_lr_ratio

    @property
    def text_lr_ratio(self) -> float:
        """How much faster `up` matrices of the text encoder learn than `down` ones (LoRA+)."""
        return self.loraplus_text_encoder_lr_ratio or self.loraplus_lr_ratio

    def scaled_alpha(self, alpha: float | None, rank: int) -> float:
        """Return the alpha that divided by the rank is the scale; the given one without rs_lora."""
        alpha = alpha or rank
        return alpha * math.sqrt(rank) if self.rs_lora else alpha

    def rank_in_block(self, path: str, own: int | None, network_dim: int) -> int:
        """Return the rank of a layer in a block: `own` unless it is None or the whole block is left out."""
        of_block = self.of_block(self.block_dims, path)
        if of_block == 0:
            return 0
        default = network_dim if of_block is None else of_block
        return default if own is None else own

    def of_block(self, values: tuple[float, ...] | None, path: str) -> float | None:
        """Return the value for the block of `BLOCKS` that `path` is in."""
        head, *rest = path.split(".")
        return values[int(rest[0])] if values is not None and head == self.BLOCKS else None

    def _chosen(self, path: str) -> bool:
        """Whether the patterns let the layer at `path` in."""
        if any(pattern.fullmatch(path) for pattern in self.include_patterns):
            return True
        if self.include_patterns and not self.exclude_patterns:
            return False
        return not any(pattern.fullmatch(path) for pattern in self.exclude_patterns)


def _first_match(table: Iterable[tuple[re.Pattern[str], float]], path: str) -> float | None:
    return next((value for pattern, value in table if pattern.fullmatch(path)), None)
