"""LyCORIS for any family of models: what `--network_module lycoris.kohya` stands for here.

The lycoris-lora package says which layers get a network, of which kind and of which sizes
(`networks/lycoris/package.py`), so that arguments and presets mean what they mean in sd-scripts. What is
trained, saved and applied is ours (`networks/lycoris/layer.py`), in files that LyCORIS and ComfyUI read. To
use such a file, or to go on from it with --dim_from_weights, the package is not needed.

Importing this module does not import torch, so that arguments and files are checked before that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from library.core.errors import ConfigError, MissingPackageError
from library.core.log import logger
from library.options.network import NetworkOptions
from networks.files import LycorisFile, inspect_lora
from networks.fit import Shapes
from networks.from_file import dit_paths, text_paths
from networks.lycoris.args import PRESETS, read_args, without_effect
from networks.names import DIT, TEXT_ENCODER
from networks.request import NetworkRequest

if TYPE_CHECKING:
    from torch import nn

    from networks.lycoris.layer import LycorisSize
    from networks.lycoris.network import LycorisNetwork

_FOR_TRAINING = {
    *("dropout", "rank_dropout", "module_dropout", "rank_dropout_scale"),
    *("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
}
_log = logger("network")


def check_options(options: NetworkOptions) -> None:
    """Read `--network_args` and check what goes with them. Torch-free.

    Raises:
        ConfigError: an unknown key, a value that cannot be, or what does not go together.
        MissingPackageError: the lycoris-lora package is needed and not installed.
    """
    chosen = read_args(options.args_by_key())
    if options.dim_from_weights:
        return
    if find_spec("lycoris") is None:
        raise MissingPackageError("lycoris-lora", "--network_module lycoris.kohya")
    if options.network_weights is not None and chosen.preset in PRESETS:  # a file can ask for any kind
        file = inspect_lora(options.network_weights)
        kinds = {layer.kind for layer in file.layers.values()} if isinstance(file, LycorisFile) else {"lora"}
        if kinds != {chosen.algo}:
            raise ConfigError(
                f"--network_weights {file.path} is of the kind {' and '.join(sorted(kinds))}, but algo is "
                f"{chosen.algo}; --dim_from_weights takes kinds and sizes from the file."
            )


def check_layers(options: NetworkOptions, layers: Shapes) -> None:
    """Check nothing: which layers there are, the package can say only of a model. Torch-free."""


def no_diffusers(options: NetworkOptions) -> str:
    """Return why what is trained cannot have diffusers' names in files."""
    return "diffusers has no names for what --network_module lycoris.kohya trains"


def create_network(model: nn.Module, request: NetworkRequest) -> LycorisNetwork:
    """Make a new network for `model`; it has no effect until `apply_to` and training.

    Raises:
        ConfigError: arguments that cannot be, or that fit no layer.
        CheckpointError: `sizes_from` is not for this model.
    """
    return _create(model, DIT, request)


def create_text_network(model: nn.Module, request: NetworkRequest) -> LycorisNetwork:
    """Make a new network for what `text_model` returns. Raises as `create_network`."""
    network = _create(model, TEXT_ENCODER, request)
    network.rate = request.lr
    return network


def _create(model: nn.Module, prefix: str, request: NetworkRequest) -> LycorisNetwork:
    from networks.layer import Dropouts, linear_layers  # here, because it imports torch
    from networks.lycoris.network import LycorisNetwork, sizes_of_file
    from networks.lycoris.package import planned

    chosen, for_text = read_args(request.args), prefix == TEXT_ENCODER
    if request.sizes_from is None:
        sizes = planned(model, chosen, dim=request.dim, alpha=request.alpha, text_encoder=for_text)
    else:
        paths_in = text_paths if for_text else dit_paths
        sizes = sizes_of_file(model, request.sizes_from, paths_in(request.sizes_from, linear_layers(model)))
        if not sizes:
            raise ConfigError(
                f"--dim_from_weights: {request.sizes_from.path} has nothing for the {_part(for_text)}."
            )
    sizes = {path: replace(size, rescale_dropout=chosen.rank_dropout_scale) for path, size in sizes.items()}
    network = LycorisNetwork(
        model,
        sizes,
        dropouts=Dropouts(
            (request.dropout or 0.0) if chosen.dropout is None else chosen.dropout,
            chosen.rank_dropout,
            chosen.module_dropout,
        ),
        loraplus_lr_ratio=chosen.lr_ratio(text_encoder=for_text),
        seed=request.seed,
        prefix=prefix,
        group="text_encoder" if for_text else "lora",
        device=request.device,
    )
    from_file = request.sizes_from is not None
    _tell(_part(for_text), network, sizes.values(), request.args, from_file=from_file)
    return network


def _part(for_text: bool) -> str:
    return "text encoder" if for_text else "DiT"


def _tell(
    what: str,
    network: LycorisNetwork,
    sizes: Collection[LycorisSize],
    args: Mapping[str, str],
    *,
    from_file: bool,
) -> None:
    """Say what was made, and what has no say in it."""
    kinds = Counter(size.kind for size in sizes)
    told = ", ".join(f"{kind} on {count}" for kind, count in kinds.items())
    count = f"{network.parameter_count():,}"
    _log.info("LyCORIS: %s layers of the %s, %s parameters", told, what, count)
    moot = [key for key in args if key not in _FOR_TRAINING] if from_file else []
    if moot:
        _log.warning(
            "--network_args %s: no effect, because with --dim_from_weights layers, kinds and sizes are those "
            "of --network_weights",
            ", ".join(moot),
        )
    for sentence in without_effect({key: args[key] for key in args if key not in moot}, kinds):
        _log.warning("%s", sentence)
