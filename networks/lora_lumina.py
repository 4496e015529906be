"""LoRA for Lumina Image 2.0: which layers get one, and of which rank. `--network_module` names this module.

Layers and what sets their rank, in this order; a rank of 0 leaves the layer out:

    layers                                                  rank
    whatever a pattern of network_reg_dims matches          the value behind the first such pattern
    x_embedder, t_embedder.mlp.{0,2}, cap_embedder.1        embedder_dims=[x,t,cap], else none
    everything in noise_refiner and context_refiner         refiner_dim, if given
    attention.qkv, attention.out of every block             attn_dim, else the block's rank
    feed_forward.w1, w2, w3 of every block                  mlp_dim, else the block's rank
    adaLN_modulation.1 of every block and of final_layer    mod_dim, else the block's rank
    final_layer.linear                                      network_dim

The block's rank is network_dim, or the block's number in `block_dims=8,8,16,...`, a list for `layers`; a 0
there leaves the whole block out. `block_alphas` and `block_lrs` are lists for `layers` too.

`train_blocks` narrows the blocks: all, transformer (layers.*), refiners, noise_refiner or context_refiner.
final_layer belongs to "all" only; embedders are trained when they are asked for, whatever the blocks. Without
arguments that makes 180 layers of the 2B model.

`exclude_patterns` and `include_patterns` narrow what is left: a layer is out if an exclude pattern matches it
and no include pattern does; include patterns alone exclude everything else. `network_reg_lrs` gives the
layers that a pattern matches a learning rate of their own, before `block_lrs`. A pattern is a regular
expression for the whole path of a layer, such as `layers\\.1[0-9]\\.attention.*`; one that matches nothing
is an error.

`split_qkv=True` trains a LoRA of that rank for each of q, k and v. The file has one LoRA for the fused layer,
of three times the rank, with the same effect. `rs_lora=True` scales by alpha / sqrt(rank) in place of alpha /
rank (arXiv 2312.03732); the file's alpha is such that alpha / rank is that number, so that any reader gets it
right.

Importing this module does not import torch, so that arguments and files are checked before that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.core.errors import CheckpointError, ConfigError
from library.core.log import logger
from library.core.suggest import did_you_mean, shorten
from networks.files import LoRAFile, inspect_lora
from networks.lumina_args import LuminaLoRAArgs
from networks.names import ALPHA, kohya_name
from networks.network_args import parse_args

if TYPE_CHECKING:
    from torch import nn

    from networks.lora import LoRANetwork, LoRASize

QKV, TEXT_ENCODER = "attention.qkv", "lora_te"
_NO_DORA = "there is no DoRA here; rs_lora, split_qkv or a larger rank also make a LoRA more able"
_NO_INIT = "LoRAs start from kohya's weights (down random, up zero); leave it out"
_REFUSED = {
    "conv_dim": "the model has no convolutions",
    "conv_alpha": "the model has no convolutions",
    "dora_wd": _NO_DORA,
    "use_dora": _NO_DORA,
    "weight_decompose": _NO_DORA,
    "init_lora_weights": _NO_INIT,
    "pissa_init": _NO_INIT,
}
_FOR_TRAINING = {
    *("block_lrs", "network_reg_lrs", "split_qkv", "rank_dropout", "module_dropout"),
    *("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio", "verbose"),
}


_FOR_TEXT_ENCODER = {
    *("rs_lora", "rank_dropout", "module_dropout"),
    *("loraplus_lr_ratio", "loraplus_text_encoder_lr_ratio", "verbose"),
}


def check_args(
    args: Mapping[str, str], *, sizes_from_file: bool = False, dit: bool = True, text_encoder: bool = False
) -> LuminaLoRAArgs:
    """Read `--network_args`. Torch-free.

    Args:
        sizes_from_file: layers, ranks and alphas are those of a file, so arguments about them are wrong.
        dit, text_encoder: what is trained.

    Raises:
        ConfigError: an unknown key, a value that cannot be, or one that has no say.
    """
    chosen = parse_args(LuminaLoRAArgs, args, _REFUSED)
    moot = [key for key in args if sizes_from_file and key not in _FOR_TRAINING]
    if moot:
        raise ConfigError(
            f"--network_args {', '.join(moot)}: with --dim_from_weights, layers, ranks and alphas are those "
            f"of --network_weights; leave one or the other out."
        )
    moot = [key for key in args if not dit and key not in _FOR_TEXT_ENCODER]
    if moot:
        raise ConfigError(
            f"--network_args {', '.join(moot)} is for the DiT, which --network_train_text_encoder_only "
            f"leaves as it is; leave one or the other out."
        )
    if "loraplus_text_encoder_lr_ratio" in args and not text_encoder:
        raise ConfigError(
            "--network_args loraplus_text_encoder_lr_ratio: the text encoder is not trained; add "
            "--network_train_text_encoder, or leave it out."
        )
    return chosen


def check_layers(
    args: Mapping[str, str], files: Iterable[LoRAFile], layers: Iterable[str], *, dit: bool = True
) -> None:
    """Check arguments and files against the paths of the DiT's linear layers. Torch-free.

    Raises:
        ConfigError: an argument that does not fit these layers; not looked at if the DiT is not trained.
        CheckpointError: a file with LoRAs for other layers.
    """
    layers = list(layers)
    if dit:
        parse_args(LuminaLoRAArgs, args, _REFUSED).check_layers(layers)
    for file in files:
        _dit_ranks(file, {kohya_name(layer): layer for layer in layers})


def create_network(
    model: nn.Module,
    *,
    dim: int,
    alpha: float | None,
    dropout: float | None = None,
    args: Mapping[str, str] | None = None,
    seed: int = 0,
    sizes_from: LoRAFile | None = None,
) -> LoRANetwork:
    """Make a new network for `model`; it has no effect until `apply_to` and training.

    Args:
        dim: rank where `args` does not set another. alpha: None or 0 means each layer's rank.
        dropout: probability with which entries of the rank-wide hidden features are dropped in training.
        seed: the start weights are a function of it and of each layer's name.
        sizes_from: take layers, ranks and alphas from this file instead; its weights are not loaded.

    Raises:
        ConfigError: an argument that cannot be, or one that leaves no layer to train.
        CheckpointError: `sizes_from` is not for this model.
    """
    from networks.layer import Dropouts, linear_layers  # here, because it imports torch
    from networks.lora import LoRANetwork

    chosen = parse_args(LuminaLoRAArgs, args or {}, _REFUSED)
    layers = linear_layers(model)
    chosen.check_layers(layers)
    if sizes_from is None:
        sizes = _sizes(chosen, layers, dim, alpha)
    else:
        sizes = _sizes_of_file(chosen, layers, sizes_from)
    if not sizes:
        raise ConfigError("--network_dim and --network_args leave no layer to train; raise a rank above 0.")
    network = LoRANetwork(
        model,
        sizes,
        dropouts=Dropouts(dropout or 0.0, chosen.rank_dropout, chosen.module_dropout),
        loraplus_lr_ratio=chosen.lr_ratio,
        seed=seed,
    )
    _tell("DiT", network, chosen)
    return network


def text_model(encoder: nn.Module) -> nn.Module:
    """Return the part of the text encoder (`Gemma2Encoder`) whose layers can have LoRAs."""
    return encoder.model


def create_text_network(
    model: nn.Module,
    *,
    dim: int,
    alpha: float | None,
    lr: float,
    dropout: float | None = None,
    args: Mapping[str, str] | None = None,
    seed: int = 0,
    sizes_from: LoRAFile | None = None,
) -> LoRANetwork:
    """Make a new network for what `text_model` returns, with `lora_te_` before its names.

    All its layers get a LoRA of rank `dim`. Of `args`, dropouts, LoRA+, rs_lora and verbose have a say here.

    Raises:
        ConfigError: an argument that cannot be. CheckpointError: `sizes_from` is not for this encoder.
    """
    from networks.layer import Dropouts, linear_layers  # here, because it imports torch
    from networks.lora import LoRANetwork, LoRASize

    chosen = parse_args(LuminaLoRAArgs, args or {}, _REFUSED)
    layers = linear_layers(model)
    if sizes_from is None:
        sizes = dict.fromkeys(layers, LoRASize(dim, chosen.scaled_alpha(alpha, dim), lr))
    else:
        state, paths = sizes_from.read(), _text_paths(sizes_from, layers)
        sizes = {
            path: LoRASize(sizes_from.ranks[name], state[name + ALPHA].item(), lr)
            for name, path in paths.items()
        }
    if not sizes:
        raise ConfigError(
            "--dim_from_weights: the file of --network_weights has nothing for the text encoder."
        )
    network = LoRANetwork(
        model,
        sizes,
        dropouts=Dropouts(dropout or 0.0, chosen.rank_dropout, chosen.module_dropout),
        loraplus_lr_ratio=chosen.text_lr_ratio,
        seed=seed,
        prefix=TEXT_ENCODER,
        group="text_encoder",
    )
    _tell("text encoder", network, chosen)
    return network


def create_text_network_from_file(model: nn.Module, path: Path, multiplier: float = 1.0) -> LoRANetwork:
    """Make the part of a LoRA file that is for what `text_model` returns; not applied yet.

    Raises:
        CheckpointError: the file is not for this encoder, or is damaged.
    """
    from networks.layer import linear_layers  # here, because it imports torch
    from networks.lora import LoRANetwork, LoRASize

    file = inspect_lora(path)
    paths = _text_paths(file, linear_layers(model))
    state = file.read()
    sizes = {paths[name]: LoRASize(file.ranks[name], state[name + ALPHA].item()) for name in paths}
    network = LoRANetwork(model, sizes, prefix=TEXT_ENCODER)
    network.load_state({key: state[key] for key in network.export_state()}, str(path))
    network.multiplier = multiplier
    return network


def _tell(what: str, network: LoRANetwork, chosen: LuminaLoRAArgs) -> None:
    log = logger("network")
    count = f"{network.parameter_count():,}"
    log.info("LoRA on %d layers of the %s, %s parameters", len(network.loras), what, count)
    if chosen.verbose:
        log.info("layers:\n%s", network.describe())


def _text_paths(file: LoRAFile, layers: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Return the encoder's layers by the names that a file has for them.

    Other tools save LoRAs for Gemma2's last layer too, which has no part in the features: they are left out.
    """
    known = {kohya_name(path, TEXT_ENCODER): path for path in layers}
    count = len({path.split(".")[1] for path in layers})
    names = [name for name in file.ranks if name.startswith(TEXT_ENCODER + "_")]
    names = [name for name in names if not name.startswith(f"{TEXT_ENCODER}_layers_{count}_")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise CheckpointError(
            f"{file.path} has LoRAs for {len(unknown)} layers that this text encoder lacks: "
            f"{shorten(unknown)}{did_you_mean(unknown[0], known) or '.'}"
        )
    return {name: known[name] for name in names}


def _sizes(
    chosen: LuminaLoRAArgs, layers: Mapping[str, nn.Linear], dim: int, alpha: float | None
) -> dict[str, LoRASize]:
    """Return the LoRA of each layer that gets one, as the arguments say."""
    from networks.lora import LoRASize  # here, because it imports torch

    sizes = {}
    for path in layers:
        rank = chosen.rank_of(path, dim)
        if rank > 0:
            widths = _qkv_widths(path, layers) if chosen.split_qkv else ()
            sizes[path] = LoRASize(rank, chosen.alpha_of(path, alpha, rank), chosen.lr_of(path), widths)
    return sizes


def _sizes_of_file(
    chosen: LuminaLoRAArgs, layers: Mapping[str, nn.Linear], file: LoRAFile
) -> dict[str, LoRASize]:
    """Return the LoRA of each layer that gets one, as in a file."""
    from networks.lora import LoRASize  # here, because it imports torch

    paths = {kohya_name(layer): layer for layer in layers}
    state, sizes = file.read(), {}
    for name, rank in _dit_ranks(file, paths).items():
        path, alpha = paths[name], state[name + ALPHA].item()
        widths = _qkv_widths(path, layers) if chosen.split_qkv else ()
        if widths and rank % len(widths):
            raise CheckpointError(
                f"{file.path}: '{name}' has rank {rank}, which is not three times that of q, k and v, so it "
                f"cannot be continued with split_qkv."
            )
        parts = len(widths) or 1
        sizes[path] = LoRASize(rank // parts, alpha / parts, chosen.lr_of(path), widths)
    return sizes


def _qkv_widths(path: str, layers: Mapping[str, nn.Linear]) -> tuple[int, ...]:
    """Return how many features q, k and v have, if `path` is a layer that makes them; else nothing."""
    if not path.endswith(QKV):
        return ()
    output = layers[path.removesuffix("qkv") + "out"]
    query = output.in_features  # what the heads put out is as wide as the queries
    key = (layers[path].out_features - query) // 2
    return query, key, key


def create_network_from_file(model: nn.Module, path: Path, multiplier: float = 1.0) -> LoRANetwork:
    """Make the part of a LoRA file that is for the DiT, with its ranks and alphas; not applied yet.

    `create_text_network_from_file` makes the other part.

    Raises:
        CheckpointError: the file is not a plain LoRA for this model's layers, or is damaged.
    """
    from networks.layer import linear_layers  # here, because it imports torch
    from networks.lora import LoRANetwork, LoRASize

    file = inspect_lora(path)
    paths = {kohya_name(layer): layer for layer in linear_layers(model)}
    ranks, state = _dit_ranks(file, paths), file.read()
    sizes = {paths[name]: LoRASize(rank, state[name + ALPHA].item()) for name, rank in ranks.items()}
    network = LoRANetwork(model, sizes)
    own = {key: tensor for key, tensor in state.items() if not key.startswith(TEXT_ENCODER)}
    network.load_state(own, str(path))
    network.multiplier = multiplier
    return network


def _dit_ranks(file: LoRAFile, known: Mapping[str, str]) -> dict[str, int]:
    """Return the ranks of a file's DiT layers. Raises CheckpointError unless the model has all of them."""
    ranks = {name: rank for name, rank in file.ranks.items() if not name.startswith(TEXT_ENCODER + "_")}
    unknown = [name for name in ranks if name not in known]
    if unknown:
        base = file.metadata.get("ss_base_model_version") or file.metadata.get("modelspec.architecture")
        made_for = f" Its metadata says it was made for '{base}'." if base else ""
        raise CheckpointError(
            f"{file.path} has LoRAs for {len(unknown)} layers that this model lacks: {shorten(unknown)}"
            f"{did_you_mean(unknown[0], known) or '.'}{made_for}"
        )
    return ranks
