"""What `--network_args` may say to networks.lora_lumina, and what follows for a layer. Torch-free.

The meaning of each argument is told in networks/lora_lumina.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from library.core.errors import ConfigError
from networks.network_args import (
    arg,
    to_bool,
    to_choice,
    to_pattern_table,
    to_patterns,
    to_positive,
    to_positive_list,
    to_probability,
    to_rank,
    to_rank_list,
    to_ranks,
    to_start,
)

EMBEDDERS = ("x_embedder", "t_embedder", "cap_embedder")
REFINERS = ("noise_refiner", "context_refiner")
BLOCKS = {
    "all": ("layers", *REFINERS, "final_layer"),
    "transformer": ("layers",),
    "refiners": REFINERS,
    "noise_refiner": ("noise_refiner",),
    "context_refiner": ("context_refiner",),
}
Patterns = tuple[re.Pattern[str], ...]


@dataclass(frozen=True, kw_only=True)
class LuminaLoRAArgs:
    """What `--network_args` may say. None: as `network_dim`, `network_alpha` and the learning rate say."""

    attn_dim: int | None = arg(None, to_rank)
    mlp_dim: int | None = arg(None, to_rank)
    mod_dim: int | None = arg(None, to_rank)
    refiner_dim: int | None = arg(None, to_rank)
    embedder_dims: tuple[int, ...] | None = arg(None, to_ranks(len(EMBEDDERS), "[x,t,cap]"))
    train_blocks: str = arg("all", to_choice(*BLOCKS))
    block_dims: tuple[int, ...] | None = arg(None, to_rank_list)
    block_alphas: tuple[float, ...] | None = arg(None, to_positive_list)
    block_lrs: tuple[float, ...] | None = arg(None, to_positive_list)
    network_reg_dims: tuple[tuple[re.Pattern[str], int], ...] = arg((), to_pattern_table(to_rank))
    network_reg_lrs: tuple[tuple[re.Pattern[str], float], ...] = arg((), to_pattern_table(to_positive))
    exclude_patterns: Patterns = arg((), to_patterns)
    include_patterns: Patterns = arg((), to_patterns)
    split_qkv: bool = arg(False, to_bool)
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
    conv_dim: int | None = arg(None, to_rank)  # of other models: this one has no convolutions
    conv_alpha: float | None = arg(None, to_positive)

    def rank_of(self, path: str, network_dim: int) -> int:
        """Return the rank of the LoRA on the linear layer at `path`; 0 for none."""
        if not self._chosen(path):
            return 0
        named = _first_match(self.network_reg_dims, path)
        return self._rank_by_place(path, network_dim) if named is None else named

    def alpha_of(self, path: str, network_alpha: float | None, rank: int) -> float:
        """Return the alpha that divided by the rank is the scale of the LoRA at `path`."""
        return self.scaled_alpha(self._of_block(self.block_alphas, path) or network_alpha, rank)

    def lr_of(self, path: str) -> float | None:
        """Return the learning rate of the layer at `path` where it has one of its own."""
        named = _first_match(self.network_reg_lrs, path)
        return self._of_block(self.block_lrs, path) if named is None else named

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
        blocks = len({path.split(".")[1] for path in paths if path.startswith("layers.")})
        for key in ("block_dims", "block_alphas", "block_lrs"):
            values = getattr(self, key)
            if values is not None and len(values) != blocks:
                raise ConfigError(
                    f"--network_args {key} has {len(values)} values, but the model has {blocks} blocks in "
                    f"'layers'."
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

    def _chosen(self, path: str) -> bool:
        """Whether the patterns let the layer at `path` in."""
        if any(pattern.fullmatch(path) for pattern in self.include_patterns):
            return True
        if self.include_patterns and not self.exclude_patterns:
            return False
        return not any(pattern.fullmatch(path) for pattern in self.exclude_patterns)

    def _rank_by_place(self, path: str, network_dim: int) -> int:
        head, *rest = path.split(".")
        if head in EMBEDDERS:
            return self.embedder_dims[EMBEDDERS.index(head)] if self.embedder_dims else 0
        if head not in BLOCKS[self.train_blocks]:
            return 0
        if head in REFINERS and self.refiner_dim is not None:
            return self.refiner_dim
        of_block = self._of_block(self.block_dims, path)
        if of_block == 0:
            return 0
        by_part = {"attention": self.attn_dim, "feed_forward": self.mlp_dim, "adaLN_modulation": self.mod_dim}
        own = next((by_part[part] for part in rest if part in by_part), None)
        default = network_dim if of_block is None else of_block
        return default if own is None else own

    def _of_block(self, values: tuple[float, ...] | None, path: str) -> float | None:
        """Return the value for the block of `layers` that `path` is in."""
        head, *rest = path.split(".")
        return values[int(rest[0])] if values is not None and head == "layers" else None


def _first_match(table: Iterable[tuple[re.Pattern[str], float]], path: str) -> float | None:
    return next((value for pattern, value in table if pattern.fullmatch(path)), None)
