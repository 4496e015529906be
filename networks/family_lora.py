"""LoRA for any family of models: which layers get a new one, and of which size.

A module that `--network_module` may name, such as networks/lora_lumina.py, is a `LoRAModule` of its family,
and tells which arguments set ranks. All families share the following `--network_args`.

`block_dims=8,8,16,...` has a rank for each block; a 0 there leaves the whole block out. `block_alphas` and
`block_lrs` are such lists too.

`exclude_patterns` and `include_patterns` narrow what is trained: a layer is out if an exclude pattern matches
it and no include pattern does; include patterns alone exclude everything else. `network_reg_dims` gives the
layers that a pattern matches a rank, before everything else, and `network_reg_lrs` a learning rate, before
`block_lrs`. A pattern is a regular expression for the whole path of a layer, such as
`layers\\.1[0-9]\\.attention.*`; one that matches nothing is an error.

`rs_lora=True` scales by alpha / sqrt(rank) in place of alpha / rank (arXiv 2312.03732); the file's alpha is
such that alpha / rank is that number, so that any reader gets it right.

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
from typing import TYPE_CHECKING

from library.core.errors import CheckpointError, ConfigError
from library.core.log import logger
from library.options.network import NetworkOptions
from networks.families.args import LoRAArgs
from networks.families.family import Family
from networks.families.known import family_of
from networks.files import LoRAFile, inspect_lora
from networks.fit import Shapes, Size, check_sizes
from networks.from_file import dit_paths, last_layer, sizes_in_file, text_paths
from networks.names import DIT, TEXT_ENCODER, is_anchored
from networks.network_args import parse_args
from networks.request import NetworkRequest

if TYPE_CHECKING:
    from torch import nn

    from networks.lora import LoRANetwork, LoRASize

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


class LoRAModule:
    """What a module for LoRAs of one family offers; see `networks.module.NetworkModule`."""

    def __init__(self, family: Family) -> None:
        self.family = family

    def check_options(self, options: NetworkOptions) -> None:
        """Read `--network_args` and check what goes with them.

        Raises:
            ConfigError: an unknown key, a value that cannot be, one that has no say, or does not go together
                with another option.
        """
        self.family.check_text_encoder(options)
        args = options.args_by_key()
        chosen = self._parse(args)
        _check_moot(options, args)
        for sentence in _without_effect(options, args):
            _log.warning("%s", sentence)
        if chosen.wd_on_output and not chosen.dora_wd:
            raise ConfigError("--network_args wd_on_output is for DoRAs; add dora_wd=True, or leave it out.")
        if is_anchored(chosen.init):
            _check_anchored(options, chosen.init)

    def check_layers(self, options: NetworkOptions, layers: Shapes) -> None:
        """Check arguments, and the sizes in --network_weights, against the DiT's linear layers.

        Raises:
            ConfigError: the layers are of another family, an argument does not fit them, or there is nothing
                to train; the latter two are not looked at if the DiT is not trained.
            CheckpointError: the network to start from is another one than is to be trained.
        """
        self._require_family(layers)
        chosen = self._parse(options.args_by_key())
        if options.trains_dit:
            chosen.check_layers(layers)
        file = None if options.network_weights is None else inspect_lora(options.network_weights)
        if options.dim_from_weights:
            _check_parts(chosen, layers, file)
            return
        sizes = dict(_planned(chosen, options, layers)) if options.trains_dit else {}
        if options.trains_dit and not sizes:
            raise _nothing_to_train()
        if file is not None:
            alpha = chosen.scaled_alpha(options.network_alpha, options.network_dim)
            check_sizes(file, layers, sizes, Size(options.network_dim, alpha, chosen.dora))

    def no_diffusers(self, options: NetworkOptions) -> str | None:
        """Return why what is trained cannot have diffusers' names in files; None if it can."""
        if options.trains_text_encoder:
            return "diffusers has no LoRAs for the text encoder of this model"
        kinds: set[str | None] = {self._parse(options.args_by_key()).dora}
        if options.dim_from_weights:
            file = inspect_lora(options.network_weights)
            kinds = {file.doras.get(name) for name in file.ranks}
        if "input" in kinds:
            return "diffusers knows only DoRAs with a length for each output feature (wd_on_output=True)"
        if len(kinds) > 1:
            return f"{options.network_weights} has LoRAs and DoRAs, and in diffusers all must be of one kind"
        return None

    def create_network(self, model: nn.Module, request: NetworkRequest) -> LoRANetwork:
        """Make a new network for `model`; it has no effect until `apply_to` and training.

        Raises:
            ConfigError: an argument that cannot be, one that leaves no layer to train, or a model of another
                family. CheckpointError: `sizes_from` is not for this model.
        """
        from networks.layer import linear_layers  # here, because it imports torch

        chosen = self._parse(request.args)
        layers = linear_layers(model)
        self._require_family(layers)
        chosen.check_layers(layers)
        if request.sizes_from is None:
            sizes = _sizes(chosen, layers, request)
        else:
            sizes = _sizes_of_file(chosen, layers, request.sizes_from)
        if not sizes:
            raise _nothing_to_train()
        return _new(model, sizes, chosen, request, DIT)

    def create_text_network(self, model: nn.Module, request: NetworkRequest) -> LoRANetwork:
        """Make a new network for what `text_model` returns, with `lora_te_` before its names.

        All its layers get a LoRA of rank `dim`. Of `args`, those that are not about layers have a say here.

        Raises:
            ConfigError: an argument that cannot be. CheckpointError: `sizes_from` is not for this encoder.
        """
        from networks.layer import linear_layers  # here, because it imports torch
        from networks.lora import LoRASize

        chosen = self._parse(request.args)
        layers = linear_layers(model)
        if request.sizes_from is None:
            scaled = chosen.scaled_alpha(request.alpha, request.dim)
            size = LoRASize(request.dim, scaled, request.lr, dora=chosen.dora, start=chosen.init)
            sizes = dict.fromkeys(layers, size)
        else:
            sizes = sizes_in_file(request.sizes_from, text_paths(request.sizes_from, layers), request.lr)
        if not sizes:
            raise ConfigError(
                "--dim_from_weights: the file of --network_weights has nothing for the text encoder."
            )
        return _new(model, sizes, chosen, request, TEXT_ENCODER, ignored=(last_layer(layers),))

    def _parse(self, args: Mapping[str, str]) -> LoRAArgs:
        return parse_args(self.family.args, args, self.family.refused)

    def _require_family(self, layers: Iterable[str]) -> None:
        """Raise ConfigError if a model of these layers is known to be of another family."""
        found = family_of(layers)
        if found not in (None, self.family):
            raise ConfigError(
                f"--network_module {self.family.module} is for {self.family.name}, but the model is "
                f"{found.name}; give --network_module {found.module}."
            )


def _nothing_to_train() -> ConfigError:
    return ConfigError("--network_dim and --network_args leave no layer to train; raise a rank above 0.")


def _planned(chosen: LoRAArgs, options: NetworkOptions, layers: Shapes) -> Iterator[tuple[str, Size]]:
    """Yield the LoRA of each layer that gets one, by path, as it will be in a file."""
    for path, (out_features, in_features) in layers.items():
        rank = chosen.rank_of(path, options.network_dim)
        if rank > 0:
            parts = len(chosen.widths_of(path, in_features, out_features)) or 1
            alpha = chosen.alpha_of(path, options.network_alpha, rank)
            yield path, Size(parts * rank, parts * alpha, chosen.dora)


def _check_parts(chosen: LoRAArgs, layers: Shapes, file: LoRAFile) -> None:
    """Raise CheckpointError if a file has a LoRA that cannot be divided into those of a layer's parts."""
    for name, path in dit_paths(file, layers).items():
        out_features, in_features = layers[path]
        rank, widths = file.ranks[name], chosen.widths_of(path, in_features, out_features)
        if widths and rank % len(widths):
            raise CheckpointError(
                f"{file.path}: the LoRA of '{path}' has rank {rank}, which is not three times that of "
                f"q, k and v, so it cannot be continued with split_qkv."
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


def _check_anchored(options: NetworkOptions, start: str) -> None:
    """Raise ConfigError for options that do not go together with a start from the model's own weights."""
    if options.network_weights is not None:
        raise ConfigError(
            f"--network_args init={start} and --network_weights both say what the LoRA starts from; "
            f"give one of them. To go on from such a file: --network_weights with --dim_from_weights."
        )
    if options.scale_weight_norms:
        raise ConfigError(
            f"--scale_weight_norms cannot scale down a LoRA with init={start}: what it has learnt is "
            f"the difference to its start weights, which no factor on its own can make smaller."
        )


def _without_effect(options: NetworkOptions, args: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each argument that scripts bring along from other tools and that does nothing."""
    reasons = {"conv_dim": _NO_CONVOLUTIONS, "conv_alpha": _NO_CONVOLUTIONS}
    if not options.trains_text_encoder:
        reasons["loraplus_text_encoder_lr_ratio"] = "the text encoder is not trained"
    for key in args:
        if key in reasons:
            yield f"--network_args {key} has no effect: {reasons[key]}"


def _new(
    model: nn.Module,
    sizes: Mapping[str, LoRASize],
    chosen: LoRAArgs,
    request: NetworkRequest,
    prefix: str,
    ignored: tuple[str, ...] = (),
) -> LoRANetwork:
    """Make a new network of these sizes, and say what it is."""
    from networks.layer import Dropouts  # here, because it imports torch
    from networks.lora import LoRANetwork

    of_text = prefix == TEXT_ENCODER
    network = LoRANetwork(
        model,
        sizes,
        dropouts=Dropouts(request.dropout or 0.0, chosen.rank_dropout, chosen.module_dropout),
        loraplus_lr_ratio=chosen.text_lr_ratio if of_text else chosen.lr_ratio,
        seed=request.seed,
        prefix=prefix,
        group="text_encoder" if of_text else "lora",
        ignored=ignored,
        device=request.device,
    )
    what, count = "text encoder" if of_text else "DiT", f"{network.parameter_count():,}"
    _log.info("LoRA on %d layers of the %s, %s parameters", len(network.loras), what, count)
    if chosen.verbose:
        _log.info("layers:\n%s", network.describe())
    return network


def _sizes(chosen: LoRAArgs, layers: Mapping[str, nn.Linear], request: NetworkRequest) -> dict[str, LoRASize]:
    """Return the LoRA of each layer that gets one, as the arguments say."""
    from networks.lora import LoRASize  # here, because it imports torch

    sizes = {}
    for path, layer in layers.items():
        rank = chosen.rank_of(path, request.dim)
        if rank > 0:
            widths = chosen.widths_of(path, layer.in_features, layer.out_features)
            scaled = chosen.alpha_of(path, request.alpha, rank)
            sizes[path] = LoRASize(rank, scaled, chosen.lr_of(path), widths, chosen.dora, chosen.init)
    return sizes


def _sizes_of_file(chosen: LoRAArgs, layers: Mapping[str, nn.Linear], file: LoRAFile) -> dict[str, LoRASize]:
    """Return the LoRA of each layer that gets one, as in a file; what is not there, as the arguments say."""
    sizes = sizes_in_file(file, dit_paths(file, layers))
    _check_parts(chosen, {path: (m.out_features, m.in_features) for path, m in layers.items()}, file)
    for path, size in sizes.items():
        widths = chosen.widths_of(path, layers[path].in_features, layers[path].out_features)
        parts = len(widths) or 1
        sizes[path] = replace(
            size, rank=size.rank // parts, alpha=size.alpha / parts, lr=chosen.lr_of(path), widths=widths
        )
    return sizes
