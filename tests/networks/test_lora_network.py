"""A LoRA network as a whole: applying, switching, merging, exporting, loading."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from library.core.errors import CheckpointError
from networks.layer import LoRALinear, linear_layers
from networks.lora import LoRANetwork, LoRASize, merge

Inputs = tuple[Tensor, Tensor, Tensor]
Make = Callable[..., nn.Module]


@pytest.fixture
def model(lumina_like: Make) -> nn.Module:
    return lumina_like()


@pytest.fixture
def network(model: nn.Module, sizes_of: Callable, randomise: Callable) -> LoRANetwork:
    """A network with weights on every layer of `model`; not applied."""
    network = LoRANetwork(model, sizes_of(model))
    randomise(network)
    return network


def test_a_new_network_changes_no_bit(model: nn.Module, inputs: Inputs, sizes_of: Callable) -> None:
    before = model(*inputs)
    LoRANetwork(model, sizes_of(model)).apply_to(model)
    assert torch.equal(model(*inputs), before)


def test_applied_network_acts_and_can_be_switched_off(
    model: nn.Module, network: LoRANetwork, inputs: Inputs
) -> None:
    before = model(*inputs)
    network.apply_to(model)
    acting = model(*inputs)
    assert (acting - before).abs().max() > 0.01
    network.enabled = False
    assert torch.equal(model(*inputs), before)
    network.multiplier = 0.5  # while off: remembered, without effect yet
    assert torch.equal(model(*inputs), before)
    network.enabled = True
    assert not torch.equal(model(*inputs), acting) and not torch.equal(model(*inputs), before)
    network.multiplier = 0.0
    assert torch.equal(model(*inputs), before)
    network.multiplier = 1.0
    assert torch.equal(model(*inputs), acting)


def test_remove_puts_the_same_layers_back(model: nn.Module, network: LoRANetwork, inputs: Inputs) -> None:
    layers, names, before = linear_layers(model), list(model.state_dict()), model(*inputs)
    network.apply_to(model)
    assert all(isinstance(model.get_submodule(path), LoRALinear) for path in layers)
    network.remove()
    assert all(model.get_submodule(path) is layer for path, layer in layers.items())
    assert list(model.state_dict()) == names
    assert torch.equal(model(*inputs), before)
    network.apply_to(model)  # and it can be used again
    assert not torch.equal(model(*inputs), before)


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_networks_add_up_and_leave_in_any_order(
    model: nn.Module, inputs: Inputs, sizes_of: Callable, randomise: Callable, first_out: int
) -> None:
    model = model.double()
    inputs = tuple(x.double() for x in inputs)
    networks = [LoRANetwork(model, sizes_of(model, rank)) for rank in (2, 5)]
    for seed, network in enumerate(networks):
        randomise(network, seed)
        network.apply_to(model)
    assert len(linear_layers(model)) == len(networks[0].loras)
    together = model(*inputs)
    stays = networks[1 - first_out]
    networks[first_out].remove()
    alone = model(*inputs)
    stays.remove()
    plain = model(*inputs)
    for network in networks:
        merge(model, [network])
    assert torch.allclose(model(*inputs), together, atol=1e-9)
    assert not torch.allclose(together, alone) and not torch.allclose(alone, plain)


def test_the_model_does_not_own_the_network(model: nn.Module, network: LoRANetwork) -> None:
    network.apply_to(model)
    model.to(torch.bfloat16).train().requires_grad_(False)
    network.eval()
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in network.parameters())
    assert not any(lora.training for lora in network.loras.values())
    own = {id(p) for p in network.parameters()}
    assert not own & {id(p) for p in model.parameters()}
    assert all("lora" not in name for name in model.state_dict())


def test_training_lowers_the_loss_and_leaves_the_base_alone(
    model: nn.Module, inputs: Inputs, sizes_of: Callable
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = LoRANetwork(model, sizes_of(model))
    network.apply_to(model)
    optimizer = torch.optim.AdamW(network.parameter_groups(lr=1e-2))
    target = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(60):
        loss = (model(*inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    network.remove()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("multiplier", [1.0, -0.7])
def test_merging_equals_applying(
    model: nn.Module, network: LoRANetwork, inputs: Inputs, multiplier: float
) -> None:
    model, inputs = model.double(), tuple(x.double() for x in inputs)
    network.double().multiplier = multiplier
    network.apply_to(model)
    applied = model(*inputs)
    network.remove()
    merge(model, [network])
    assert torch.allclose(model(*inputs), applied, atol=1e-5)  # the delta is made in fp32


def test_merging_adds_in_fp32_and_rounds_once(
    lumina_like: Make, sizes_of: Callable, randomise: Callable
) -> None:
    model = lumina_like().to(torch.bfloat16)
    networks = [LoRANetwork(model, sizes_of(model, rank)) for rank in (2, 3)]
    for seed, network in enumerate(networks):
        randomise(network, seed)
    path, name = "layers.0.attention.qkv", "lora_unet_layers_0_attention_qkv"
    weight = model.get_submodule(path).weight.double()
    for network in networks:
        weight = weight + 2.0 / network.loras[name].rank * (
            network.loras[name].up.double() @ network.loras[name].down.double()
        )
    merge(model, networks)
    merged = model.get_submodule(path).weight
    assert merged.dtype == torch.bfloat16 and not merged.requires_grad
    assert torch.equal(merged, weight.float().to(torch.bfloat16))


def test_each_weight_goes_when_it_is_replaced(model: nn.Module, network: LoRANetwork) -> None:
    weights = [weakref.ref(layer.weight) for layer in linear_layers(model).values()]
    *_, last = network.loras.values()
    there: list[int] = []
    delta = last.delta

    def counted(weight: Tensor) -> Tensor:
        there.append(sum(reference() is not None for reference in weights))
        return delta(weight)

    last.delta = counted
    merge(model, [network])
    assert there == [1] and not any(reference() is not None for reference in weights)


def test_merging_a_network_that_is_off_changes_nothing(model: nn.Module, network: LoRANetwork) -> None:
    before = list(model.parameters())
    network.multiplier = 0.0
    merge(model, [network])
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))


def test_exports_kohyas_keys_and_loads_them_again(
    model: nn.Module, network: LoRANetwork, inputs: Inputs, sizes_of: Callable
) -> None:
    state = network.export_state()
    key = "lora_unet_layers_0_attention_qkv"
    assert state[f"{key}.lora_down.weight"].shape == (3, 12)
    assert state[f"{key}.lora_up.weight"].shape == (20, 3)
    assert state[f"{key}.alpha"].shape == () and state[f"{key}.alpha"] == 2.0
    assert len(state) == 3 * len(linear_layers(model))
    fresh = LoRANetwork(model, sizes_of(model))
    fresh.load_state(state)
    network.apply_to(model)
    expected = model(*inputs)
    network.remove()
    fresh.apply_to(model)
    assert torch.equal(model(*inputs), expected)


def test_export_is_a_copy_in_the_wanted_precision(network: LoRANetwork) -> None:
    state = network.export_state(torch.bfloat16)
    lora = network.loras["lora_unet_x_embedder"]
    assert torch.equal(state["lora_unet_x_embedder.lora_up.weight"], lora.up.to(torch.bfloat16))
    exact = network.export_state()["lora_unet_x_embedder.lora_up.weight"]
    with torch.no_grad():
        lora.up.zero_()
    assert exact.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("lora_unet_x_embedder.alpha"), "lacks 1 keys .*x_embedder.alpha"),
        (
            lambda s: s.update({"lora_unet_x_embeder.alpha": torch.tensor(1.0)}),
            "did you mean 'lora_unet_x_emb",
        ),
        (lambda s: s.update({"lora_unet_x_embedder.lora_up.weight": torch.zeros(12, 9)}), r"shape \(12, 9\)"),
        (lambda s: s.update({"lora_unet_x_embedder.alpha": torch.tensor(7.0)}), "is 7, but .* alpha 2"),
    ],
)
def test_loading_refuses_what_does_not_fit(
    network: LoRANetwork, change: Callable[[dict], object], message: str
) -> None:
    state = {key: tensor + 1 if "weight" in key else tensor for key, tensor in network.export_state().items()}
    change(state)
    before = network.export_state()
    with pytest.raises(CheckpointError, match="file.safetensors.*" + message):
        network.load_state(state, "file.safetensors")
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.export_state().items())


def test_start_weights_do_not_depend_on_the_other_layers(model: nn.Module, sizes_of: Callable) -> None:
    whole = LoRANetwork(model, sizes_of(model), seed=7)
    single = LoRANetwork(model, {"x_embedder": LoRASize(3, 2.0)}, seed=7)
    other = LoRANetwork(model, {"x_embedder": LoRASize(3, 2.0)}, seed=8)
    name = "lora_unet_x_embedder"
    assert torch.equal(whole.loras[name].down, single.loras[name].down)
    assert not torch.equal(other.loras[name].down, single.loras[name].down)


def test_loraplus_gives_up_matrices_their_own_rate(model: nn.Module, sizes_of: Callable) -> None:
    network = LoRANetwork(model, sizes_of(model), loraplus_lr_ratio=16.0)
    downs, ups = network.parameter_groups(lr=1e-4)
    assert downs["lr"] == 1e-4 and ups["lr"] == pytest.approx(1.6e-3)
    assert {p.shape[0] for p in downs["params"]} == {3} and {p.shape[1] for p in ups["params"]} == {3}
    assert len(downs["params"]) + len(ups["params"]) == len(list(network.parameters()))
    (group,) = LoRANetwork(model, sizes_of(model)).parameter_groups(lr=1e-4)
    assert group["lr"] == 1e-4 and len(group["params"]) == len(list(network.parameters()))


def test_max_norm_scales_down_what_is_too_large_and_nothing_else(
    model: nn.Module, network: LoRANetwork
) -> None:
    layers = linear_layers(model)

    def delta(name: str) -> Tensor:
        return network.loras[name].delta(layers[network.paths[name]].weight)

    before = {name: delta(name) for name in network.loras}
    norms = {name: change.norm().item() for name, change in before.items()}
    limit = sorted(norms.values())[len(norms) // 2] * 1.001
    network.multiplier = 0.3  # has no say
    scaled, average, largest = network.apply_max_norm(limit).tolist()
    network.multiplier = 1.0
    for name in network.loras:
        if norms[name] <= limit:
            assert torch.equal(delta(name), before[name])
        else:
            assert torch.allclose(delta(name), before[name] * (limit / norms[name]), rtol=1e-4, atol=1e-6)
            assert delta(name).norm().item() == pytest.approx(limit, rel=1e-5)
    kept = [min(norm, limit) for norm in norms.values()]
    assert scaled == sum(norm > limit for norm in norms.values()) > 0
    assert average == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    assert largest == pytest.approx(limit, rel=1e-5)
    assert network.apply_max_norm(limit * 1.01)[0] == 0


def test_max_norm_of_a_new_network_is_zero(model: nn.Module, sizes_of: Callable) -> None:
    done = LoRANetwork(model, sizes_of(model)).apply_max_norm(1.0)
    assert done.tolist() == [0, 0, 0]
