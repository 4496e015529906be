"""The modules that `--network_module` may name: what they must offer, and how one is found. Torch-free."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from library.core.errors import CheckpointError, ConfigError
from library.core.log import logger
from library.options.network import NetworkOptions
from library.options.saving import DIFFUSERS, SavingOptions
from networks.families.known import FAMILIES, family_of
from networks.files import LoRAFile, LycorisFile, inspect_lora
from networks.fit import Shapes, check_widths
from networks.from_file import create_network_from_file, create_text_network_from_file, text_model
from networks.request import NetworkRequest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from networks.lora import LoRANetwork

LYCORIS = "lycoris.kohya"
_STAND_INS = {LYCORIS: "networks.lycoris.module"}  # a module of ours for a name that users know
_log = logger("network")


@runtime_checkable
class NetworkModule(Protocol):
    """A kind of network for a family of models. Importing it must not import torch."""

    def check_options(self, options: NetworkOptions) -> None:
        """Read `--network_args`; raise ConfigError for a mistake, also for what has no say, or does not go
        together with other options."""
        ...

    def check_layers(self, options: NetworkOptions, layers: Shapes) -> None:
        """Check arguments, and the sizes in --network_weights, against the DiT's linear layers.

        Raises ConfigError or CheckpointError for what does not fit.
        """
        ...

    def no_diffusers(self, options: NetworkOptions) -> str | None:
        """Return why what is trained cannot have diffusers' names in files; None if it can."""
        ...

    def create_network(self, model: nn.Module, request: NetworkRequest) -> LoRANetwork:
        """Make a new network for `model`, without effect until it is applied and trained."""
        ...

    def create_text_network(self, model: nn.Module, request: NetworkRequest) -> LoRANetwork:
        """Make a new network for what `text_model` returns."""
        ...


def load_network_module(name: str) -> NetworkModule:
    """Import the module that `--network_module` names.

    Raises:
        ConfigError: there is no such module, or it is not one for networks.
    """
    there = ", ".join([*(family.module for family in FAMILIES), LYCORIS])
    try:
        module = importlib.import_module(_STAND_INS.get(name, name))
    except ModuleNotFoundError as error:
        root, _, algo = name.rpartition(".")
        way_out = f"there is {there}"
        if root == "networks" and algo in ("loha", "lokr"):
            way_out = f"use --network_module {LYCORIS} --network_args algo={algo}"
        raise ConfigError(
            f"--network_module {name}: there is no module '{error.name}'; {way_out}."
        ) from error
    if not isinstance(module, NetworkModule):
        raise ConfigError(
            f"--network_module {name} is not a module for networks, as networks/module.py describes them; "
            f"there is {there}."
        )
    return module


def check_network(options: NetworkOptions) -> None:
    """Check module, arguments and start weights before torch is imported.

    Raises:
        ConfigError: an unknown module or a mistake in `--network_args`.
        CheckpointError: `--network_weights` or one of `--base_weights` is not a LoRA file, or the former is
            for a text encoder that is not trained.
    """
    module = load_network_module(options.network_module)
    module.check_options(options)
    if options.network_weights is not None:
        _check_parts(options, inspect_lora(options.network_weights))
    for path in options.base_weights:
        inspect_lora(path)


def check_layers(options: NetworkOptions, layers: Shapes) -> None:
    """Check the network's arguments and files against the DiT's linear layers. Torch-free.

    Raises:
        ConfigError: a module for another family, an argument that does not fit the model, or nothing to
            train.
        CheckpointError: a file of another model, or one to start from that has other layers or sizes.
    """
    family = family_of(layers)
    if family is not None:
        family.check_text_encoder(options)
    weights = () if options.network_weights is None else (options.network_weights,)
    for path in (*weights, *options.base_weights):
        check_widths(inspect_lora(path), layers)
    load_network_module(options.network_module).check_layers(options, layers)


def check_saving(options: NetworkOptions, saving: SavingOptions) -> None:
    """Check that files can have the names that `--save_format` asks for. Torch-free.

    Raises:
        ConfigError: what is trained cannot be written so.
    """
    if saving.save_format == DIFFUSERS:
        reason = load_network_module(options.network_module).no_diffusers(options)
        if reason is not None:
            raise ConfigError(
                f"--save_format {DIFFUSERS} cannot be used: {reason}; leave it out, for files with "
                f"kohya's names."
            )


def apply_base_weights(options: NetworkOptions, model: nn.Module) -> None:
    """Merge `--base_weights` into the weights of `model`, all at once, so that they are rounded once.

    Raises:
        CheckpointError: a file is not for this model.
    """
    from networks.lora import merge  # here, because it imports torch

    merge(model, [create_network_from_file(model, path, strength) for path, strength in options.bases()])
    for path, strength in options.bases():
        _log.info("merged %s into the model, times %g", path, strength)


def apply_base_text_weights(options: NetworkOptions, encoder: nn.Module) -> None:
    """Merge what `--base_weights` have for the text encoder into it, like `apply_base_weights`.

    Raises:
        CheckpointError: a file is not for this encoder.
    """
    from networks.lora import merge  # here, because it imports torch

    model, files = text_model(encoder), _base_text_files(options)
    merge(model, [create_text_network_from_file(model, path, strength) for path, strength in files])
    for path, strength in files:
        _log.info("merged %s into the text encoder, times %g", path, strength)


def base_text_identity(options: NetworkOptions, sha256: Callable[[Path], str]) -> str:
    """Return what `--base_weights` make of the text encoder, as a text; empty if they leave it as it is.

    What the encoder says depends on it, so caches of that must. `sha256`: digest of a file. Torch-free.
    """
    return " ".join(
        f"{sha256(inspect_lora(path).tensors)}*{strength!r}" for path, strength in _base_text_files(options)
    )


def _base_text_files(options: NetworkOptions) -> list[tuple[Path, float]]:
    """Return those of `--base_weights` that change the text encoder, with their strengths."""
    return [(path, s) for path, s in options.bases() if s != 0 and inspect_lora(path).has_text_encoder]


def install_network(
    options: NetworkOptions,
    model: nn.Module,
    load_encoder: Callable[[], nn.Module],
    *,
    seed: int,
    learning_rate: float,
    device: torch.device | None = None,
) -> LoRANetwork:
    """Make what is trained, from `--network_weights` where given, and apply it.

    Args:
        model: the DiT. load_encoder: returns the text encoder; called only if that is trained.
        learning_rate: the rate of the text encoder unless `--text_encoder_lr` says another.
        device: where its weights shall lie; None: where the layers' weights lie.

    Raises:
        ConfigError: the arguments leave nothing to train, or do not fit the model.
        CheckpointError: `--network_weights` is of other layers, ranks or alphas.
    """
    network = install_new_network(
        options, model, load_encoder, seed=seed, learning_rate=learning_rate, device=device
    )
    if options.network_weights is not None:
        weights = inspect_lora(options.network_weights)
        network.load_state(weights.read(), str(weights.path))
    return network


def install_new_network(
    options: NetworkOptions,
    model: nn.Module,
    load_encoder: Callable[[], nn.Module],
    *,
    seed: int,
    learning_rate: float,
    device: torch.device | None = None,
) -> LoRANetwork:
    """Do what `install_network` does, but for the weights: of `--network_weights` only the sizes are used."""
    from networks.lora import JointNetwork  # here, because it imports torch

    if not options.trains_text_encoder:
        if _could_train_text_encoder(model):
            _log.info("only the DiT is trained, not the text encoder")
        return _on_dit(options, model, seed, device)
    networks = [_on_text_encoder(options, load_encoder(), seed, learning_rate, device)]
    if options.trains_dit:
        networks.append(_on_dit(options, model, seed, device))
    return JointNetwork(networks)


def _could_train_text_encoder(model: nn.Module) -> bool:
    from networks.layer import linear_layers  # here, because it imports torch

    family = family_of(linear_layers(model))
    return family is None or family.no_text_encoder is None


def _on_dit(options: NetworkOptions, model: nn.Module, seed: int, device: torch.device | None) -> LoRANetwork:
    module = load_network_module(options.network_module)
    network = module.create_network(model, _request(options, seed, device))
    network.apply_to(model)
    return network


def _on_text_encoder(
    options: NetworkOptions,
    encoder: nn.Module,
    seed: int,
    learning_rate: float,
    device: torch.device | None,
) -> LoRANetwork:
    module = load_network_module(options.network_module)
    model = text_model(encoder)
    lr = options.text_encoder_lr[0] if options.text_encoder_lr else learning_rate
    network = module.create_text_network(model, replace(_request(options, seed, device), lr=lr))
    network.apply_to(model)
    return network


def _request(options: NetworkOptions, seed: int, device: torch.device | None) -> NetworkRequest:
    return NetworkRequest(
        dim=options.network_dim,
        alpha=options.network_alpha,
        dropout=options.network_dropout,
        args=options.args_by_key(),
        seed=seed,
        sizes_from=inspect_lora(options.network_weights) if options.dim_from_weights else None,
        device=device,
    )


def _check_parts(options: NetworkOptions, weights: LoRAFile) -> None:
    """Raise CheckpointError if `--network_weights` is of another kind, or a part of it would be lost."""
    if isinstance(weights, LycorisFile) and options.network_module != LYCORIS:
        raise CheckpointError(
            f"--network_weights {weights.path} is a network of LyCORIS; to go on from it, give "
            f"--network_module {LYCORIS}."
        )
    has_dit = any(not name.startswith("lora_te") for name in weights.ranks)
    if weights.has_text_encoder and not options.trains_text_encoder:
        raise CheckpointError(
            f"--network_weights {weights.path} is for the text encoder too; train that too, with "
            f"--network_train_text_encoder, or start from a file without it."
        )
    if options.trains_text_encoder and not weights.has_text_encoder:
        raise CheckpointError(
            f"--network_weights {weights.path} has nothing for the text encoder, which is trained; name a "
            f"file that has, or leave out what asks for it: --network_train_text_encoder, "
            f"--network_train_text_encoder_only, --text_encoder_lr."
        )
    if options.trains_dit and not has_dit:
        raise CheckpointError(
            f"--network_weights {weights.path} has nothing for the DiT; name a file that has."
        )
    if has_dit and not options.trains_dit:
        raise CheckpointError(
            f"--network_weights {weights.path} is for the DiT too; train both, with "
            f"--network_train_text_encoder in place of --network_train_text_encoder_only."
        )


def network_facts(network: LoRANetwork) -> dict[str, object]:
    """Return what the metadata says of a network whose sizes came from a file: the commonest of them."""
    sizes = Counter((lora.rank, lora.alpha) for lora in network.loras.values())
    (rank, alpha), _ = sizes.most_common(1)[0]
    return {"network_dim": rank, "network_alpha": alpha}
