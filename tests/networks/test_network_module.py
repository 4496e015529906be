"""From `--network_*` options to the network that is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library.core.errors import CheckpointError, ConfigError
from library.options.network import NetworkOptions
from networks.files import save_network
from networks.from_file import create_network_from_file
from networks.lora import LoRANetwork
from networks.module import apply_base_weights, check_network, install_network, network_facts

Make = Callable[..., nn.Module]


def make_network(options: NetworkOptions, model: nn.Module, seed: int) -> LoRANetwork:
    """Make the network for the DiT alone; not applied."""
    network = install_network(options, model, nn.Module, seed=seed, learning_rate=1e-3)
    network.remove()
    return network


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
    with pytest.raises(
        CheckpointError, match=r"first.safetensors: .*shape \(4, .*needs \(8, .*--dim_from_weights takes them"
    ):
        make_network(options(network_weights=path, network_dim=8), lumina_like(), seed=2)
    with pytest.raises(CheckpointError, match="first.safetensors: .*is 1, but this network has alpha 2"):
        make_network(options(network_weights=path, network_alpha=2.0), lumina_like(), seed=2)


def written(path: Path, model: nn.Module, randomise: Callable, seed: int = 3, **changes: object) -> Path:
    network = make_network(options(**changes), model, seed=1)
    randomise(network, seed)
    save_network(path, network.export_state(), {})
    return path


def test_dims_can_come_from_the_weights(lumina_like: Make, randomise: Callable, tmp_path: Path) -> None:
    args = ("attn_dim=2", "mod_dim=0", "embedder_dims=[1,0,3]", "loraplus_lr_ratio=4")
    path = written(
        tmp_path / "a.safetensors",
        lumina_like(),
        randomise,
        network_dim=6,
        network_alpha=3.0,
        network_args=args,
    )
    chosen = options(
        network_weights=path,
        dim_from_weights=True,
        network_dropout=0.1,
        network_args=("block_lrs=1e-4,2e-4",),
    )
    network = make_network(chosen, lumina_like(), seed=2)
    saved = load_file(path)
    assert network.export_state().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in network.export_state().items())
    assert {group["lr"] for group in network.parameter_groups(1e-3)} == {1e-3, 1e-4, 2e-4}
    assert next(iter(network.loras.values())).dropouts.neuron == 0.1
    assert network_facts(network) == {"network_dim": 6, "network_alpha": 3.0}


def test_a_split_network_can_take_its_dims_from_a_file(
    lumina_like: Make, randomise: Callable, tmp_path: Path
) -> None:
    split = ("split_qkv=True",)
    path = written(tmp_path / "a.safetensors", lumina_like(), randomise, network_args=split)
    chosen = options(network_weights=path, dim_from_weights=True, network_args=split)
    network = make_network(chosen, lumina_like(), seed=2)
    qkv = network.loras["lora_unet_layers_0_attention_qkv"]
    assert (qkv.rank, qkv.alpha, qkv.widths) == (4, 1.0, (12, 4, 4))
    fused = written(tmp_path / "b.safetensors", lumina_like(), randomise)
    with pytest.raises(CheckpointError, match="has rank 4, which is not three times"):
        make_network(
            options(network_weights=fused, dim_from_weights=True, network_args=split), lumina_like(), seed=2
        )


def test_sizes_are_said_once(lumina_like: Make, randomise: Callable, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", lumina_like(), randomise)
    with pytest.raises(ConfigError, match="attn_dim, rs_lora: with --dim_from_weights"):
        check_network(
            options(network_weights=path, dim_from_weights=True, network_args=("attn_dim=4", "rs_lora=True"))
        )
    for words, message in (
        ({"dim_from_weights": True}, "needs --network_weights"),
        ({"base_weights_multiplier": (1.0,)}, "gives 1 strengths, but --base_weights names 0 files"),
        ({"base_weights": (path,), "base_weights_multiplier": (math.nan,)}, "finite"),
        ({"scale_weight_norms": -1.0}, "scale_weight_norms is -1.0; it must be 0 or more"),
        ({"text_encoder_lr": (-1.0,)}, "text_encoder_lr is -1.0"),
        ({"text_encoder_lr": (0.0,), "network_train_text_encoder": True}, "contradict"),
        (
            {"network_train_text_encoder_only": True, "network_train_unet_only": True},
            "--network_train_text_encoder_only contradict",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            options(**words)


def test_base_weights_are_merged_before_training(
    lumina_like: Make, inputs: tuple[Tensor, ...], randomise: Callable, tmp_path: Path
) -> None:
    paths = tuple(written(tmp_path / f"{n}.safetensors", lumina_like(), randomise, seed=n) for n in (1, 2, 3))
    expected = lumina_like()
    for path, strength in zip(paths, (0.5, -0.2, 1.0), strict=True):
        create_network_from_file(expected, path, strength).apply_to(expected)
    model = lumina_like()
    chosen = options(base_weights=paths, base_weights_multiplier=(0.5, -0.2))
    check_network(chosen)
    before = model(*inputs)
    apply_base_weights(chosen, model)
    assert torch.allclose(model(*inputs), expected(*inputs), atol=1e-4)
    assert not torch.allclose(model(*inputs), before, atol=1e-2)
    merged = model(*inputs)
    make_network(chosen, model, seed=1).apply_to(model)
    assert torch.equal(model(*inputs), merged)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_base_weights_must_be_for_the_model(lumina_like: Make, randomise: Callable, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        check_network(options(base_weights=(tmp_path / "nowhere.safetensors",)))
    path = written(tmp_path / "a.safetensors", lumina_like(layers=3), randomise)
    with pytest.raises(CheckpointError, match="layers that this model lacks"):
        apply_base_weights(options(base_weights=(path,)), lumina_like(layers=2))
