"""Start weights: PiSSA and OLoRA train as in peft, and a file holds what was learnt, for the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library.core.errors import ConfigError
from library.core.seeds import generator
from library.options.network import NetworkOptions
from networks.files import save_network
from networks.from_file import create_network_from_file
from networks.layer import Dropouts, LoRA, LoRALinear
from networks.lora import LoRANetwork
from networks.lora_lumina import create_network
from networks.module import check_network
from networks.request import NetworkRequest
from networks.start import start_weights

Make = Callable[..., nn.Module]
KINDS = ["pissa", "olora"]


def make_layer(start: str, *, rank: int = 4, alpha: float = 2.0, dtype=torch.float32) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(12, 20, dtype=dtype))
    lora = LoRA(12, 20, rank, alpha=alpha, start=start)
    lora.reset(1, "layer", layer.base)
    layer.loras = (lora,)
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_trains_as_in_peft(kind: str) -> None:
    """peft takes the start out of the weight, here it is taken out of the LoRA: the same function of both."""
    layer = make_layer(kind)
    (lora,) = layer.loras
    inner = nn.Linear(12, 20)
    with torch.no_grad():
        inner.weight.copy_(layer.base.weight)
        inner.bias.copy_(layer.base.bias)
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0"], init_lora_weights=kind)
    model = peft.get_peft_model(nn.Sequential(inner), config)
    theirs = model.base_model.model[0]
    pair = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    assert torch.allclose(lora.up @ lora.down, pair[1] @ pair[0], atol=1e-5)
    mine = torch.optim.SGD([lora.down, lora.up], lr=0.05)
    other = torch.optim.SGD(pair, lr=0.05)
    random = torch.Generator().manual_seed(1)
    for _ in range(5):
        x, target = torch.randn(9, 12, generator=random), torch.randn(9, 20, generator=random)
        losses = [(run(x) - target).square().mean() for run in (layer, model)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        for loss, optimizer in zip(losses, (mine, other), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert torch.allclose(layer(x), model(x), atol=1e-5)
    merged = layer.base.weight + lora.delta(layer.base.weight)
    assert torch.allclose(merged, theirs.base_layer.weight + theirs.get_delta_weight("default"), atol=1e-5)
    assert (lora.delta(layer.base.weight)).norm() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, "pissa_niter_4", "gaussian", "kaiming"])
def test_a_new_one_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    layer = make_layer(kind, dtype=dtype)
    x = torch.randn(40, 12, dtype=dtype)
    assert torch.equal(layer(x), layer.base(x))
    layer.loras[0].dropouts = Dropouts(neuron=0.3, rank=0.3)
    assert torch.equal(layer(x), layer.base(x))


def test_pissa_is_the_best_approximation() -> None:
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    down, up = start_weights("pissa", weight, 3, 0.5, generator(0, "x"))
    left, values, right = torch.linalg.svd(weight)
    assert torch.allclose(0.5 * up @ down, left[:, :3] * values[:3] @ right[:3], atol=1e-5)
    assert torch.allclose(down.norm(dim=1), up.norm(dim=0), rtol=1e-5)  # shared out equally
    near_down, near_up = start_weights("pissa_niter_8", weight, 3, 0.5, generator(0, "x"))
    assert torch.allclose(near_up @ near_down, up @ down, atol=1e-3)


def test_gaussian_is_as_wide_as_in_peft() -> None:
    down, up = start_weights("gaussian", torch.empty(4, 9000), 8, 1.0, generator(0, "x"))
    assert down.std().item() == pytest.approx(1 / 8, rel=0.02) and not up.any()


def test_dropout_drops_a_rank_with_its_start() -> None:
    layer = make_layer("pissa")
    (lora,) = layer.loras
    with torch.no_grad():
        lora.up.normal_()
        lora.down.normal_()
    lora.dropouts = Dropouts(rank=0.5)
    torch.manual_seed(3)
    factor = lora.draw_factor(torch.randn(6, 12), 8)
    assert factor.shape == (1, 8) and torch.equal(factor[:, :4], factor[:, 4:]) and (factor == 0).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"split_qkv": "True"}, {"dora_wd": "True"}, {"rs_lora": "True"}])
def test_a_file_is_a_lora_of_twice_the_rank_for_the_whole_model(
    lumina_like: Make,
    inputs: tuple[Tensor, ...],
    randomise: Callable,
    tmp_path: Path,
    kind: str,
    more: dict[str, str],
) -> None:
    model = lumina_like()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = model(*inputs)
    network = create_network(model, NetworkRequest(dim=3, alpha=2, args={"init": kind, **more}))
    network.apply_to(model)
    assert torch.equal(model(*inputs), plain)
    optimizer = torch.optim.SGD(network.parameter_groups(lr=0.1))
    model(*inputs).square().sum().backward()
    optimizer.step()
    trained = model(*inputs)
    assert not torch.allclose(trained, plain, atol=1e-3)
    assert all(lora.start_down.grad is None for lora in network.loras.values())
    network.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    path = tmp_path / "lora.safetensors"
    save_network(path, network.export_state(), {})
    parts = 3 if "split_qkv" in more else 1
    assert load_file(path)["lora_unet_layers_0_attention_qkv.lora_down.weight"].shape == (6 * parts, 12)
    read = create_network_from_file(model, path)
    read.apply_to(model)
    assert torch.allclose(model(*inputs), trained, atol=1e-5)
    assert not any(lora.anchored for lora in read.loras.values())
    assert network.parameter_count() < sum(p.numel() for p in network.parameters())


def test_a_state_holds_what_it_started_from(lumina_like: Make, randomise: Callable) -> None:
    """As a resumed run does: a network made anew, whose singular vectors may come out with another sign."""
    network = create_network(lumina_like(), NetworkRequest(dim=3, alpha=2, args={"init": "pissa"}))
    again = create_network(lumina_like(), NetworkRequest(dim=3, alpha=2, args={"init": "pissa"}))
    randomise(network)
    assert {name.rpartition(".")[2] for name, _ in network.named_parameters()} == {
        *("down", "up", "start_down", "start_up")
    }
    with torch.no_grad():
        for mine, theirs in zip(network.parameters(), again.parameters(), strict=True):
            theirs.copy_(mine)
    state = again.export_state()
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.export_state().items())


def test_a_network_that_starts_so_on_the_meta_device(lumina_like: Make) -> None:
    model = lumina_like().to("meta")
    network = create_network(model, NetworkRequest(dim=3, alpha=2, args={"init": "pissa", "dora_wd": "True"}))
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


def test_what_does_not_go_together_is_refused(lumina_like: Make, randomise: Callable, tmp_path: Path) -> None:
    network = LoRANetwork(lumina_like(), {})
    save_network(tmp_path / "lora.safetensors", network.export_state(), {})

    def check(**changes: object) -> None:
        check_network(
            NetworkOptions(network_module="networks.lora_lumina", network_args=("init=pissa",), **changes)
        )

    with pytest.raises(ConfigError, match="both say what the LoRA starts from"):
        check(network_weights=tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match="cannot scale down a LoRA with init=pissa"):
        check(scale_weight_norms=1.0)
    with pytest.raises(ConfigError, match="up to rank 4 for 'layers.0.attention.qkv'"):
        args = {"init": "olora", "split_qkv": "True", "include_patterns": "layers.0.attention.qkv"}
        create_network(lumina_like(), NetworkRequest(dim=5, alpha=2, args=args))


def test_start_weights_of_a_layer_are_reproducible() -> None:
    first, second = make_layer("pissa_niter_2").loras[0], make_layer("pissa_niter_2").loras[0]
    assert torch.equal(first.down, second.down) and torch.equal(first.start_up, second.start_up)
    assert torch.equal(first.down, first.start_down) and first.down.any()
