"""LoRA for Lumina Image 2.0: which layers get one, and of which rank. `--network_module` names this module.

Layers and what sets their rank, in this order; a rank of 0 leaves the layer out:

    layers                                                  rank
    x_embedder, t_embedder.mlp.{0,2}, cap_embedder.1        embedder_dims=[x,t,cap], else none
    everything in noise_refiner and context_refiner         refiner_dim, if given
    attention.qkv, attention.out of every block             attn_dim, else network_dim
    feed_forward.w1, w2, w3 of every block                  mlp_dim, else network_dim
    adaLN_modulation.1 of every block and of final_layer    mod_dim, else network_dim
    final_layer.linear                                      network_dim

`train_blocks` narrows the blocks: all, transformer (layers.*), refiners, noise_refiner or context_refiner.
final_layer belongs to "all" only; embedders are trained when they are asked for, whatever the blocks. Without
arguments that makes 180 layers of the 2B model.

Importing this module does not import torch, so that arguments and files are checked before that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.core.errors import CheckpointError, ConfigError
from library.core.log import logger
from library.core.suggest import did_you_mean, shorten
from networks.files import ALPHA, LoRAFile, inspect_lora, kohya_name
from networks.network_args import (
    arg,
    parse_args,
    to_bool,
    to_choice,
    to_positive,
    to_probability,
    to_rank,
    to_ranks,
)

if TYPE_CHECKING:
    from torch import nn

    from networks.lora import LoRANetwork

EMBEDDERS = ("x_embedder", "t_embedder", "cap_embedder")
REFINERS = ("noise_refiner", "context_refiner")
BLOCKS = {
    "all": ("layers", *REFINERS, "final_layer"),
    "transformer": ("layers",),
    "refiners": REFINERS,
    "noise_refiner": ("noise_refiner",),
    "context_refiner": ("context_refiner",),
}


@dataclass(frozen=True, kw_only=True)
class LuminaLoRAArgs:
    """What `--network_args` may say. None: as `network_dim` says."""

    attn_dim: int | None = arg(None, to_rank)
    mlp_dim: int | None = arg(None, to_rank)
    mod_dim: int | None = arg(None, to_rank)
    refiner_dim: int | None = arg(None, to_rank)
    embedder_dims: tuple[int, ...] | None = arg(None, to_ranks(len(EMBEDDERS), "[x,t,cap]"))
    train_blocks: str = arg("all", to_choice(*BLOCKS))
    rank_dropout: float = arg(0.0, to_probability)
    module_dropout: float = arg(0.0, to_probability)
    loraplus_lr_ratio: float = arg(1.0, to_positive)
    loraplus_unet_lr_ratio: float | None = arg(None, to_positive)
    verbose: bool = arg(False, to_bool)

    def rank_of(self, path: str, network_dim: int) -> int:
        """Return the rank of the LoRA on the linear layer at `path`; 0 for none."""
        head, *rest = path.split(".")
        if head in EMBEDDERS:
            return self.embedder_dims[EMBEDDERS.index(head)] if self.embedder_dims else 0
        if head not in BLOCKS[self.train_blocks]:
            return 0
        if head in REFINERS and self.refiner_dim is not None:
            return self.refiner_dim
        by_part = {"attention": self.attn_dim, "feed_forward": self.mlp_dim, "adaLN_modulation": self.mod_dim}
        own = next((by_part[part] for part in rest if part in by_part), None)
        return network_dim if own is None else own

    @property
    def lr_ratio(self) -> float:
        """How much faster `up` matrices learn than `down` ones (LoRA+)."""
        return self.loraplus_unet_lr_ratio or self.loraplus_lr_ratio


_REFUSED = {
    "split_qkv": "q, k and v cannot have LoRAs of their own yet; without it, one for all three is trained",
    "conv_dim": "the model has no convolutions",
    "conv_alpha": "the model has no convolutions",
    "loraplus_text_encoder_lr_ratio": "the text encoder is not trained",
}


def check_args(args: Mapping[str, str]) -> LuminaLoRAArgs:
    """Read `--network_args`. Raises ConfigError for an unknown key or a value that cannot be. Torch-free."""
    return parse_args(LuminaLoRAArgs, args, _REFUSED)


def create_network(
    model: nn.Module,
    *,
    dim: int,
    alpha: float | None,
    dropout: float | None = None,
    args: Mapping[str, str] | None = None,
    seed: int = 0,
) -> LoRANetwork:
    """Make a new network for `model`; it has no effect until `apply_to` and training.

    Args:
        dim: rank where `args` does not set another. alpha: None or 0 means each layer's rank.
        dropout: probability with which entries of the rank-wide hidden features are dropped in training.
        seed: the start weights are a function of it and of each layer's name.

    Raises:
        ConfigError: an argument that cannot be, or one that leaves no layer to train.
    """
    from networks.lora import Dropouts, LoRANetwork, LoRASize, linear_layers  # here, because it imports torch

    chosen = check_args(args or {})
    ranks_by_path = {path: chosen.rank_of(path, dim) for path in linear_layers(model)}
    sizes = {path: LoRASize(rank, alpha) for path, rank in ranks_by_path.items() if rank > 0}
    if not sizes:
        raise ConfigError("--network_dim and --network_args leave no layer to train; raise a rank above 0.")
    network = LoRANetwork(
        model,
        sizes,
        dropouts=Dropouts(dropout or 0.0, chosen.rank_dropout, chosen.module_dropout),
        loraplus_lr_ratio=chosen.lr_ratio,
        seed=seed,
    )
    log = logger("network")
    log.info("LoRA on %d layers, %s parameters", len(sizes), f"{network.parameter_count():,}")
    if chosen.verbose:
        log.info("layers:\n%s", network.describe())
    return network


def create_network_from_file(model: nn.Module, path: Path, multiplier: float = 1.0) -> LoRANetwork:
    """Make the network that a LoRA file holds, with its ranks and alphas; not applied yet.

    Raises:
        CheckpointError: the file is not a plain LoRA for this model's layers, or is damaged.
    """
    from networks.lora import LoRANetwork, LoRASize, linear_layers  # here, because it imports torch

    file = inspect_lora(path)
    paths = {kohya_name(layer): layer for layer in linear_layers(model)}
    _check_layers(file, paths)
    state = file.read()
    sizes = {paths[name]: LoRASize(rank, state[name + ALPHA].item()) for name, rank in file.ranks.items()}
    network = LoRANetwork(model, sizes)
    network.load_state(state, str(path))
    network.multiplier = multiplier
    return network


def _check_layers(file: LoRAFile, known: Mapping[str, str]) -> None:
    """Raise CheckpointError unless every layer of the file is one of this model's."""
    text_encoder = [name for name in file.ranks if name.startswith("lora_te")]
    if text_encoder:
        raise CheckpointError(
            f"{file.path} also changes the text encoder ({shorten(text_encoder)}), which is not supported: "
            f"part of its effect would be lost. Use one that was trained with --network_train_unet_only."
        )
    unknown = [name for name in file.ranks if name not in known]
    if unknown:
        base = file.metadata.get("ss_base_model_version") or file.metadata.get("modelspec.architecture")
        made_for = f" Its metadata says it was made for '{base}'." if base else ""
        raise CheckpointError(
            f"{file.path} has LoRAs for {len(unknown)} layers that this model lacks: {shorten(unknown)}"
            f"{did_you_mean(unknown[0], known) or '.'}{made_for}"
        )
