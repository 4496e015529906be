"""LoRA on the real network: every layer takes part, peft agrees, and checkpointing changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn

from library.core.errors import ConfigError
from library.models.lumina2_format import NextDiTParams
from library.models.lumina2_format import linear_layers as layers_of_params
from library.models.nextdit import NextDiT
from library.nn.running.runner import MODES
from library.options.network import NetworkOptions
from networks.layer import Dropouts, linear_layers
from networks.lora import LoRANetwork, merge
from networks.lora_lumina import check_layers, create_network
from networks.request import NetworkRequest

PARAMS = NextDiTParams(
    dim=48,
    n_layers=2,
    n_noise_refiners=1,
    n_context_refiners=1,
    n_heads=4,
    n_kv_heads=2,
    head_dim=12,
    ffn_dim=64,
    cap_feat_dim=20,
    time_dim=48,
    time_frequencies=16,
    in_channels=4,
    axes_dims=(4, 4, 4),
)
ALL_LAYERS = {"embedder_dims": "[4,4,4]"}


def make_model(dtype: torch.dtype = torch.float32) -> NextDiT:
    torch.manual_seed(0)
    model = NextDiT(PARAMS)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model.requires_grad_(False).to(dtype)


def predict(model: nn.Module) -> Tensor:
    """Run a batch of two, of different sizes, and return all outputs in one row."""
    random = torch.Generator().manual_seed(1)
    images = [torch.randn(4, 8, 6, generator=random), torch.randn(4, 4, 12, generator=random)]
    captions = [torch.randn(length, 20, generator=random) for length in (5, 9)]
    return torch.cat([y.flatten() for y in model(images, torch.tensor([0.3, 0.8]), captions)]).float()


def gradients(model: nn.Module, network: LoRANetwork) -> dict[str, Tensor]:
    network.zero_grad()
    torch.manual_seed(7)  # of dropout
    predict(model).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def test_layers_are_known_before_the_model_is_built() -> None:
    def check(*args: str) -> None:
        check_layers(NetworkOptions(network_module="networks.lora_lumina", network_args=args), layers)

    layers = layers_of_params(PARAMS)
    assert layers == {path: tuple(layer.weight.shape) for path, layer in linear_layers(make_model()).items()}
    check("exclude_patterns=.*refiner.*", "block_dims=4,0")
    with pytest.raises(ConfigError, match="'attention' matches no layer"):
        check("include_patterns=attention")


def test_default_layers_are_all_but_the_embedders() -> None:
    model = make_model()
    trained = set(create_network(model, NetworkRequest(dim=4, alpha=1)).paths.values())
    embedders = {"x_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1"}
    assert trained == set(linear_layers(model)) - embedders
    with_embedders = create_network(model, NetworkRequest(dim=4, alpha=1, args=ALL_LAYERS))
    assert set(with_embedders.paths.values()) == set(linear_layers(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_network_changes_no_bit(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    before = predict(model)
    create_network(model, NetworkRequest(dim=4, alpha=1, args=ALL_LAYERS)).apply_to(model)
    assert torch.equal(predict(model), before)


def test_every_layer_takes_part(randomise: Callable) -> None:
    model = make_model()
    network = create_network(model, NetworkRequest(dim=4, alpha=4, args=ALL_LAYERS))
    randomise(network)
    network.apply_to(model)
    assert all(gradient.abs().max() > 0 for gradient in gradients(model, network).values())


def test_agrees_with_peft_on_the_whole_model(randomise: Callable) -> None:
    model, theirs = make_model(), make_model()
    network = create_network(model, NetworkRequest(dim=4, alpha=3, args=ALL_LAYERS))
    randomise(network)
    paths = list(network.paths.values())
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=3, target_modules=paths))
    factors = {}
    for name, path in network.paths.items():
        layer = theirs.base_model.model.get_submodule(path)
        factors[name] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        with torch.no_grad():
            factors[name][0].copy_(network.loras[name].down)
            factors[name][1].copy_(network.loras[name].up)
    network.apply_to(model)
    assert torch.allclose(predict(model), predict(theirs), rtol=1e-4, atol=1e-5)
    ours = gradients(model, network)
    predict(theirs).square().sum().backward()
    for name, (down, up) in factors.items():
        for part, gradient in (("down", down.grad), ("up", up.grad)):
            mine = ours[f"loras.{name}.{part}"]
            assert (mine - gradient).norm() <= 1e-4 * gradient.norm(), f"{name} {part}"


@pytest.mark.parametrize("dropouts", [Dropouts(), Dropouts(neuron=0.2, rank=0.2, module=0.2)])
def test_checkpointing_changes_no_gradient(dropouts: Dropouts, randomise: Callable) -> None:
    model = make_model()
    network = create_network(model, NetworkRequest(dim=4, alpha=4))
    randomise(network)
    for lora in network.loras.values():
        lora.dropouts = dropouts
    network.apply_to(model)
    results = []
    for mode in MODES:
        model.runner.keep(mode)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)  # a module that dropout skipped has none else
        torch.manual_seed(7)
        predict(model).square().sum().backward()
        results.append({name: p.grad.clone() for name, p in network.named_parameters()})
    for other in results[1:]:
        assert all(torch.equal(results[0][name], gradient) for name, gradient in other.items())


def test_merging_equals_applying(randomise: Callable) -> None:
    model = make_model()
    network = create_network(model, NetworkRequest(dim=4, alpha=2, args=ALL_LAYERS))
    randomise(network)
    plain = predict(model)
    network.apply_to(model)
    applied = predict(model)
    network.remove()
    assert torch.equal(predict(model), plain)
    merge(model, [network])
    assert torch.allclose(predict(model), applied, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(applied, plain, rtol=1e-2, atol=1e-2)
