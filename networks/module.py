"""The modules that `--network_module` may name: what they must offer, and how one is found. Torch-free."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from library.core.errors import ConfigError
from library.options.network import NetworkOptions
from networks.files import inspect_lora

if TYPE_CHECKING:
    from torch import nn

    from networks.lora import LoRANetwork


@runtime_checkable
class NetworkModule(Protocol):
    """A kind of network for a family of models. Importing it must not import torch."""

    def check_args(self, args: Mapping[str, str]) -> object:
        """Read `--network_args`; raise ConfigError for a mistake."""
        ...

    def create_network(
        self,
        model: nn.Module,
        *,
        dim: int,
        alpha: float | None,
        dropout: float | None = None,
        args: Mapping[str, str] | None = None,
        seed: int = 0,
    ) -> LoRANetwork:
        """Make a new network for `model`, without effect until it is applied and trained."""
        ...

    def create_network_from_file(self, model: nn.Module, path: Path, multiplier: float = 1.0) -> LoRANetwork:
        """Make the network that a file holds."""
        ...


def load_network_module(name: str) -> NetworkModule:
    """Import the module that `--network_module` names.

    Raises:
        ConfigError: there is no such module, or it is not one for networks.
    """
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        there = [f"networks.{file.stem}" for file in sorted(Path(__file__).parent.glob("lora_*.py"))]
        raise ConfigError(
            f"--network_module {name}: there is no module '{error.name}'; there is {', '.join(there)}."
        ) from error
    if not isinstance(module, NetworkModule):
        raise ConfigError(f"--network_module {name} is not a module for networks; see networks/module.py.")
    return module


def check_network(options: NetworkOptions) -> None:
    """Check module, arguments and start weights before torch is imported.

    Raises:
        ConfigError: an unknown module or a mistake in `--network_args`.
        CheckpointError: `--network_weights` is not a LoRA file.
    """
    load_network_module(options.network_module).check_args(options.args_by_key())
    if options.network_weights is not None:
        inspect_lora(options.network_weights)


def make_network(options: NetworkOptions, model: nn.Module, seed: int) -> LoRANetwork:
    """Make the network to train for `model`, from `--network_weights` where given; not applied yet.

    Raises:
        ConfigError: the arguments leave nothing to train.
        CheckpointError: `--network_weights` is of other layers, ranks or alphas.
    """
    network = load_network_module(options.network_module).create_network(
        model,
        dim=options.network_dim,
        alpha=options.network_alpha,
        dropout=options.network_dropout,
        args=options.args_by_key(),
        seed=seed,
    )
    if options.network_weights is not None:
        network.load_state(inspect_lora(options.network_weights).read(), str(options.network_weights))
    return network
