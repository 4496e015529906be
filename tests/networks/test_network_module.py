"""From `--network_*` options to the network that is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from library.core.errors import CheckpointError
from library.options.network import NetworkOptions
from networks.files import save_network
from networks.module import make_network

Make = Callable[..., nn.Module]


def options(**changes: object) -> NetworkOptions:
    return NetworkOptions(network_module="networks.lora_lumina", **changes)


def test_options_reach_the_network(lumina_like: Make) -> None:
    chosen = options(network_dim=5, network_alpha=2.0, network_dropout=0.25, network_args=("mlp_dim=3",))
    network = make_network(chosen, lumina_like(), seed=1)
    attention = network.loras["lora_unet_layers_0_attention_qkv"]
    assert (attention.rank, attention.scale, attention.dropouts.neuron) == (5, 0.4, 0.25)
    assert network.loras["lora_unet_layers_0_feed_forward_w2"].rank == 3


def test_start_weights_follow_the_seed(lumina_like: Make) -> None:
    downs = [
        make_network(options(), lumina_like(), seed).loras["lora_unet_final_layer_linear"].down
        for seed in (1, 1, 2)
    ]
    assert torch.equal(downs[0], downs[1]) and not torch.equal(downs[0], downs[2])


def test_training_can_start_from_a_file(lumina_like: Make, randomise: Callable, tmp_path: Path) -> None:
    first = make_network(options(), lumina_like(), seed=1)
    randomise(first)
    path = tmp_path / "first.safetensors"
    save_network(path, first.export_state(), {})
    second = make_network(options(network_weights=path), lumina_like(), seed=2)
    mine, theirs = first.export_state(), second.export_state()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    with pytest.raises(CheckpointError, match=r"first.safetensors: .*shape \(4, .*needs \(8, "):
        make_network(options(network_weights=path, network_dim=8), lumina_like(), seed=2)
    with pytest.raises(CheckpointError, match="first.safetensors: .*is 1, but this network has alpha 2"):
        make_network(options(network_weights=path, network_alpha=2.0), lumina_like(), seed=2)
