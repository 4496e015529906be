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

`dora_wd=True` makes DoRAs (networks/dora.py), with a magnitude of each input feature: that is what ComfyUI,
LyCORIS and OneTrainer read alike. `wd_on_output=True` takes each output feature as peft does, and LyCORIS by
default; ComfyUI then divides by the norm of the untrained weight. `init=pissa` and other names of
networks/start.py choose the start weights. A LoRA that starts from the weight itself has twice the rank in
its file, where it is what was learnt, for the model as it is.

Importing this module does not import torch, so that arguments and files are checked before that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.core.errors import CheckpointError, ConfigError
from library.core.log import logger
from library.core.suggest import did_you_mean, shorten
from library.options.network import NetworkOptions
from networks.files import LoRAFile, LycorisFile, inspect_lora
from networks.lumina_args import LuminaLoRAArgs
from networks.names import ALPHA, is_anchored, kohya_name
from networks.network_args import parse_args

if TYPE_CHECKING:
    import torch
    from torch import nn

    from networks.lora import LoRANetwork, LoRASize

QKV, DIT, TEXT_ENCODER = "attention.qkv", "lora_unet", "lora_te"
_REFUSED = {"pissa_init": "write init=pissa"}
_NO_CONVOLUTIONS = "the model has no convolutions"
_log = logger("network")
_FOR_TRAINING = {
    *("block_lrs", "network_reg_lrs", "split_qkv", "rank_dropout", "module_dropout"),
    *("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio", "verbose"),
}
_FOR_TEXT_ENCODER = {
    *("rs_lora", "use_rslora", "rank_dropout", "module_dropout"),
    *("dora_wd", "use_dora", "weight_decompose", "wd_on_output", "wd_on_out", "init", "init_lora_weights"),
    *("loraplus_lr_ratio", "loraplus_text_encoder_lr_ratio", "verbose"),
}


def check_options(options: NetworkOptions) -> None:
    """Read `--network_args` and check what goes with them. Torch-free.

    Raises:
        ConfigError: an unknown key, a value that cannot be, one that has no say, or does not go together with
            another option.
    """
    args = options.args_by_key()
    chosen = parse_args(LuminaLoRAArgs, args, _REFUSED)
    _check_moot(options, args)
    for sentence in _without_effect(options, args):
        _log.warning("%s", sentence)
    if chosen.wd_on_output and not chosen.dora_wd:
        raise ConfigError("--network_args wd_on_output is for DoRAs; add dora_wd=True, or leave it out.")
    if not is_anchored(chosen.init):
        return
    if options.network_weights is not None:
        raise ConfigError(
            f"--network_args init={chosen.init} and --network_weights both say what the LoRA starts from; "
            f"give one of them. To go on from such a file: --network_weights with --dim_from_weights."
        )
    if options.scale_weight_norms:
        raise ConfigError(
            f"--scale_weight_norms cannot scale down a LoRA with init={chosen.init}: what it has learnt is "
            f"the difference to its start weights, which no factor on its own can make smaller."
        )


def _check_moot(options: NetworkOptions, args: Mapping[str, str]) -> None:
    """Raise ConfigError for arguments that have no say."""
    moot = [key for key in args if options.dim_from_weights and key not in _FOR_TRAINING]
    if moot:
        raise ConfigError(
            f"--network_args {', '.join(moot)}: with --dim_from_weights, layers, ranks, alphas and kind are "
            f"those of --network_weights; leave one or the other out."
        )
    moot = [key for key in args if not options.trains_dit and key not in _FOR_TEXT_ENCODER]
    if moot:
        raise ConfigError(
            f"--network_args {', '.join(moot)} is for the DiT, which --network_train_text_encoder_only "
            f"leaves as it is; leave one or the other out."
        )


def _without_effect(options: NetworkOptions, args: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each argument that scripts bring along from other tools and that does nothing."""
    reasons = {"conv_dim": _NO_CONVOLUTIONS, "conv_alpha": _NO_CONVOLUTIONS}
    if not options.trains_text_encoder:
        reasons["loraplus_text_encoder_lr_ratio"] = "the text encoder is not trained"
    for key in args:
        if key in reasons:
            yield f"--network_args {key} has no effect: {reasons[key]}"


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
    device: torch.device | None = None,
) -> LoRANetwork:
    """Make a new network for `model`; it has no effect until `apply_to` and training.

    Args:
        dim: rank where `args` does not set another. alpha: None or 0 means each layer's rank.
        dropout: probability with which entries of the rank-wide hidden features are dropped in training.
        seed: the start weights are a function of it and of each layer's name.
        sizes_from: take layers, ranks, alphas and kind from this file instead; its weights are not loaded.
        device: where its weights shall lie; None: where the layers' weights lie.

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
        device=device,
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
    device: torch.device | None = None,
) -> LoRANetwork:
    """Make a new network for what `text_model` returns, with `lora_te_` before its names.

    All its layers get a LoRA of rank `dim`. Of `args`, those that are not about layers have a say here.

    Raises:
        ConfigError: an argument that cannot be. CheckpointError: `sizes_from` is not for this encoder.
    """
    from networks.layer import Dropouts, linear_layers  # here, because it imports torch
    from networks.lora import LoRANetwork, LoRASize

    chosen = parse_args(LuminaLoRAArgs, args or {}, _REFUSED)
    layers = linear_layers(model)
    if sizes_from is None:
        scaled = chosen.scaled_alpha(alpha, dim)
        sizes = dict.fromkeys(layers, LoRASize(dim, scaled, lr, dora=chosen.dora, start=chosen.init))
    else:
        sizes = _sizes_in_file(sizes_from, _text_paths(sizes_from, layers), lr)
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
        ignored=(_last_layer(layers),),
        device=device,
    )
    _tell("text encoder", network, chosen)
    return network


def create_text_network_from_file(model: nn.Module, path: Path, multiplier: float = 1.0) -> LoRANetwork:
    """Make the part of a LoRA file that is for what `text_model` returns; not applied yet.

    Raises:
        CheckpointError: the file is not for this encoder, or is damaged.
    """
    from networks.layer import linear_layers  # here, because it imports torch
    from networks.lora import LoRANetwork

    file = inspect_lora(path)
    if isinstance(file, LycorisFile):
        return _of_lycoris(model, file, TEXT_ENCODER, multiplier)
    paths = _text_paths(file, linear_layers(model))
    network = LoRANetwork(model, _sizes_in_file(file, paths), prefix=TEXT_ENCODER)
    network.load_state(file.read(paths), str(path))
    network.multiplier = multiplier
    return network


def _of_lycoris(model: nn.Module, file: LycorisFile, prefix: str, multiplier: float) -> LoRANetwork:
    from networks.lycoris.network import network_of_file  # here, because it imports torch

    return network_of_file(model, file, prefix, multiplier)


def _tell(what: str, network: LoRANetwork, chosen: LuminaLoRAArgs) -> None:
    count = f"{network.parameter_count():,}"
    _log.info("LoRA on %d layers of the %s, %s parameters", len(network.loras), what, count)
    if chosen.verbose:
        _log.info("layers:\n%s", network.describe())


def _text_paths(file: LoRAFile, layers: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Return the encoder's layers by the names that a file has for them."""
    known = {kohya_name(path, TEXT_ENCODER): path for path in layers}
    names = [name for name in file.ranks if name.startswith(TEXT_ENCODER + "_")]
    names = [name for name in names if not name.startswith(_last_layer(layers))]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise CheckpointError(
            f"{file.path} has LoRAs for {len(unknown)} layers that this text encoder lacks: "
            f"{shorten(unknown)}{did_you_mean(unknown[0], known) or '.'}"
        )
    return {name: known[name] for name in names}


def _last_layer(layers: Iterable[str]) -> str:
    """Return what the names of LoRAs for Gemma2's last layer begin with.

    It has no part in the features and is not built; other tools save LoRAs for it too, which are left out.
    """
    return f"{TEXT_ENCODER}_layers_{len({path.split('.')[1] for path in layers})}_"


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
            scaled = chosen.alpha_of(path, alpha, rank)
            sizes[path] = LoRASize(rank, scaled, chosen.lr_of(path), widths, chosen.dora, chosen.init)
    return sizes


def _sizes_of_file(
    chosen: LuminaLoRAArgs, layers: Mapping[str, nn.Linear], file: LoRAFile
) -> dict[str, LoRASize]:
    """Return the LoRA of each layer that gets one, as in a file; what is not there, as the arguments say."""
    paths = {kohya_name(layer): layer for layer in layers}
    sizes = _sizes_in_file(file, {name: paths[name] for name in _dit_ranks(file, paths)})
    for path, size in sizes.items():
        widths = _qkv_widths(path, layers) if chosen.split_qkv else ()
        if widths and size.rank % len(widths):
            raise CheckpointError(
                f"{file.path}: the LoRA of '{path}' has rank {size.rank}, which is not three times that of "
                f"q, k and v, so it cannot be continued with split_qkv."
            )
        parts = len(widths) or 1
        sizes[path] = replace(
            size, rank=size.rank // parts, alpha=size.alpha / parts, lr=chosen.lr_of(path), widths=widths
        )
    return sizes


def _sizes_in_file(file: LoRAFile, paths: Mapping[str, str], lr: float | None = None) -> dict[str, LoRASize]:
    """Return the LoRAs that a file has for the layers at `paths`, which are by name in it."""
    from networks.lora import LoRASize  # here, because it imports torch

    state = file.read(paths)
    return {
        path: LoRASize(file.ranks[name], state[name + ALPHA].item(), lr, dora=file.doras.get(name))
        for name, path in paths.items()
    }


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
    from networks.lora import LoRANetwork

    file = inspect_lora(path)
    if isinstance(file, LycorisFile):
        return _of_lycoris(model, file, DIT, multiplier)
    known = {kohya_name(layer): layer for layer in linear_layers(model)}
    paths = {name: known[name] for name in _dit_ranks(file, known)}
    network = LoRANetwork(model, _sizes_in_file(file, paths))
    network.load_state(file.read(paths), str(path))
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
