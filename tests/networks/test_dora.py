"""DoRA against peft, against the plain formula of the programs that read it, and as a part of networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.core.errors import CheckpointError, ConfigError
from library.nn.products import Linear
from library.options.network import NetworkOptions
from networks.dora import DoRALinearOp, Magnitude, scaled_linear
from networks.files import inspect_lora, save_network
from networks.from_file import create_network_from_file
from networks.layer import Dropouts, LoRA, LoRALinear, SplitLoRA
from networks.lora import LoRANetwork, merge
from networks.lora_lumina import create_network
from networks.lora_op import Constants, low_rank
from networks.module import install_network
from networks.request import NetworkRequest

Make = Callable[..., nn.Module]
AXES = [False, True]
ARGS = {False: {"dora_wd": "True"}, True: {"use_dora": "True", "wd_on_output": "True"}}


def make_layer(on_output: bool, *, rank: int = 3, dtype=torch.float32, bias: bool = True) -> LoRALinear:
    """A linear layer 12 -> 20 with a DoRA that has been trained."""
    torch.manual_seed(0)
    layer = LoRALinear(Linear(12, 20, bias=bias, dtype=dtype))
    magnitude = Magnitude(layer.base.weight, on_output=on_output)
    lora = LoRA(12, 20, rank, alpha=2.0, magnitude=magnitude)
    lora.reset(seed=1, name="layer")
    layer.loras = (lora,)
    return layer


def train(lora: LoRA) -> None:
    with torch.no_grad():
        lora.up.normal_()
        lora.magnitude.dora_scale.mul_(torch.rand_like(lora.magnitude.dora_scale) + 0.5)


def as_readers_do(weight: Tensor, tensors: dict[str, Tensor], strength: float = 1.0) -> Tensor:
    """The weight that ComfyUI and LyCORIS make of a file, written down from their formula."""
    down, up = tensors[".lora_down.weight"].float(), tensors[".lora_up.weight"].float()
    changed = weight.float() + tensors[".alpha"] / len(down) * (up @ down)
    dora_scale = tensors[".dora_scale"]
    columns = dora_scale.shape[0] == 1
    norm = changed.norm(dim=0, keepdim=True) if columns else changed.norm(dim=1, keepdim=True)
    changed = changed * (dora_scale / norm)
    return weight.float() + strength * (changed - weight.float())


@pytest.mark.parametrize("on_output", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_new_one_changes_no_bit(on_output: bool, dtype: torch.dtype) -> None:
    layer = make_layer(on_output, dtype=dtype)
    for rows in (1, 40):
        x = torch.randn(rows, 12, dtype=dtype)
        assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("on_output", AXES)
@pytest.mark.parametrize("strength", [1.0, 0.4, -1.0])
def test_acts_and_merges_as_readers_of_its_file_do(on_output: bool, strength: float) -> None:
    layer = make_layer(on_output)
    (lora,) = layer.loras
    train(lora)
    lora.set_strength(strength)
    expected = as_readers_do(layer.base.weight, lora.to_file(), strength)
    x = torch.randn(2, 7, 12)
    assert torch.allclose(layer(x), F.linear(x, expected, layer.base.bias), atol=1e-5)
    assert torch.allclose(layer.base.weight + lora.delta(layer.base.weight), expected, atol=1e-5)
    assert lora.to_file()[".dora_scale"].shape == ((20, 1) if on_output else (1, 12))


@pytest.mark.parametrize("bias", [True, False])
def test_agrees_with_peft(bias: bool) -> None:
    layer = make_layer(True, rank=4, bias=bias)
    (lora,) = layer.loras
    train(lora)
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 20, bias=bias)), config)
    theirs = model.base_model.model[0]
    m = theirs.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        theirs.base_layer.weight.copy_(layer.base.weight)
        if bias:
            theirs.base_layer.bias.copy_(layer.base.bias)
        theirs.lora_A["default"].weight.copy_(lora.down)
        theirs.lora_B["default"].weight.copy_(lora.up)
        m.copy_(lora.magnitude.dora_scale)
    x = torch.randn(2, 7, 12, requires_grad=True)
    target = torch.randn(2, 7, 20)
    ours, expected = layer(x), model(x)
    assert torch.allclose(ours, expected, atol=1e-5)
    mine = torch.autograd.grad((ours * target).sum(), (x, lora.down, lora.up, lora.magnitude.dora_scale))
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    for ours, other in zip(mine, torch.autograd.grad((expected * target).sum(), (x, a, b, m)), strict=True):
        assert (ours - other).norm() <= 1e-5 * other.norm()


def test_starts_as_in_peft() -> None:
    linear = nn.Linear(12, 20)
    config = peft.LoraConfig(r=4, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(nn.Sequential(linear), config)
    theirs = model.base_model.model[0].lora_magnitude_vector["default"].weight
    ours = Magnitude(linear.weight, on_output=True).dora_scale
    assert torch.allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("on_output", AXES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_gradients_are_the_derivatives(on_output: bool, bias: bool, masked: bool) -> None:
    random = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64, requires_grad=True)

    weight, offset = leaf(5, 4).detach(), leaf(5).detach() if bias else None
    factor = (leaf(6, 2).detach() > 0).double() * 2 if masked else 0.7
    leaves = leaf(6, 4), leaf(2, 4), leaf(5, 2), leaf(5 if on_output else 4)

    constants = Constants(offset, factor, None, (weight,))

    def fast(x: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
        return DoRALinearOp.apply(x, down, up, scale, constants, on_output, torch.float64)

    assert torch.autograd.gradcheck(fast, leaves)
    x, down, up, scale = leaves
    plain = scaled_linear(x, weight, offset, scale, on_output) + low_rank(x, down, up, factor)
    assert torch.allclose(fast(*leaves), plain, atol=1e-12)


@pytest.mark.parametrize("on_output", AXES)
def test_length_of_columns_and_rows_is_found_without_the_wide_product(on_output: bool) -> None:
    layer = make_layer(on_output)
    (lora,) = layer.loras
    train(lora)
    changed = layer.base.weight + lora.strength * (lora.up @ lora.down)
    expected = lora.magnitude.dora_scale / changed.norm(dim=1 if on_output else 0)
    found = lora.magnitude.factor(layer.base.weight, *lora.factors(), lora.strength)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert {leaf for leaf, _ in found.grad_fn.next_functions if leaf} and found.requires_grad
    found.sum().backward()
    assert lora.down.grad is None and lora.up.grad is None  # the length is taken for constant


@pytest.mark.parametrize("on_output", AXES)
def test_half_precision_is_near_the_exact_result(on_output: bool) -> None:
    layer = make_layer(on_output, dtype=torch.bfloat16)
    (lora,) = layer.loras
    train(lora)
    x = torch.randn(200, 12, dtype=torch.bfloat16, requires_grad=True)
    exact = F.linear(
        x.double(), as_readers_do(layer.base.weight, lora.to_file()).double(), layer.base.bias.double()
    )
    y = layer(x)
    assert y.dtype == torch.bfloat16 and (y - exact).norm() < 0.01 * exact.norm()
    y.square().sum().backward()
    assert lora.magnitude.dora_scale.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("on_output", AXES)
def test_checkpointing_and_dropout_agree(on_output: bool) -> None:
    layer = make_layer(on_output)
    (lora,) = layer.loras
    train(lora)
    lora.dropouts = Dropouts(neuron=0.3, rank=0.3)
    x = torch.randn(2, 5, 12, requires_grad=True)
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        y = run(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *lora.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    lora.dropouts = Dropouts(module=0.999999)
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("on_output", AXES)
@pytest.mark.parametrize("split", AXES)
def test_trains_saves_and_loads_in_a_network(
    lumina_like: Make, inputs: tuple[Tensor, ...], tmp_path: Path, on_output: bool, split: bool
) -> None:
    model = lumina_like()
    before = model(*inputs)
    args = {**ARGS[on_output], "split_qkv": str(split)}
    network = create_network(model, NetworkRequest(dim=3, alpha=2, args=args))
    network.apply_to(model)
    assert torch.equal(model(*inputs), before)
    groups = network.parameter_groups(lr=1e-2)
    assert [group["name"] for group in groups] == ["lora", "lora_magnitude"]
    assert groups[1]["weight_decay"] == 0 and len(groups[1]["params"]) == len(network.loras)
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    target = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))
    for _ in range(12):
        loss = (model(*inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = model(*inputs)
    assert loss < 0.9 * (before - target).square().mean()
    network.enabled = False
    assert torch.equal(model(*inputs), before)
    network.remove()
    path = tmp_path / "dora.safetensors"
    save_network(path, network.export_state(torch.bfloat16), {})
    stored = load_file(path)
    assert all(tensor.dtype == torch.float32 for key, tensor in stored.items() if "dora_scale" in key)
    save_network(path, network.export_state(), {})
    read = create_network_from_file(model, path)
    read.apply_to(model)
    assert torch.allclose(model(*inputs), trained, atol=1e-5)
    read.remove()
    for name, layer_path in network.paths.items():
        tensors = {
            key.removeprefix(name): t for key, t in load_file(path).items() if key.startswith(name + ".")
        }
        expected = as_readers_do(model.get_submodule(layer_path).weight, tensors)
        delta = read.loras[name].delta(model.get_submodule(layer_path).weight)
        assert torch.allclose(model.get_submodule(layer_path).weight + delta, expected, atol=1e-5)
    merge(model, [read])
    assert torch.allclose(model(*inputs), trained, atol=1e-4)


def test_several_on_one_layer_add_up(
    lumina_like: Make, inputs: tuple[Tensor, ...], randomise: Callable
) -> None:
    model = lumina_like()
    networks = [
        create_network(model, NetworkRequest(dim=2, alpha=2, args=args, seed=seed))
        for seed, args in enumerate((ARGS[False], ARGS[True], {}))
    ]
    for seed, network in enumerate(networks):
        randomise(network, seed)
        network.multiplier = 0.5 + 0.1 * seed
    single = LoRALinear(model.layers[0].attention["qkv"])
    name = "lora_unet_layers_0_attention_qkv"
    x = torch.randn(4, 12)
    for order in ((0, 1, 2), (2, 1, 0)):
        single.loras = tuple(networks[n].loras[name] for n in order)
        weight = single.base.weight + sum(lora.delta(single.base.weight) for lora in single.loras)
        assert torch.allclose(single(x), F.linear(x, weight), atol=1e-5)


def test_max_norm_looks_at_the_low_rank_part(lumina_like: Make, randomise: Callable) -> None:
    network = create_network(lumina_like(), NetworkRequest(dim=2, alpha=2, args=ARGS[False]))
    randomise(network)
    scales = [lora.magnitude.dora_scale.clone() for lora in network.loras.values()]
    assert network.apply_max_norm(0.01)[2].item() == pytest.approx(0.01, rel=1e-4)
    for lora, scale in zip(network.loras.values(), scales, strict=True):
        assert (lora.up @ lora.down).norm() <= 0.0101
        assert torch.equal(lora.magnitude.dora_scale, scale)


def options(**changes: object) -> NetworkOptions:
    return NetworkOptions(network_module="networks.lora_lumina", **changes)


def install(chosen: NetworkOptions, model: nn.Module) -> LoRANetwork:
    return install_network(chosen, model, nn.Module, seed=2, learning_rate=1e-3)


def test_training_goes_on_from_a_file(lumina_like: Make, randomise: Callable, tmp_path: Path) -> None:
    words = ("dora_wd=True", "wd_on_output=True")
    first = install(options(network_args=words), lumina_like())
    randomise(first)
    path = tmp_path / "dora.safetensors"
    save_network(path, first.export_state(), {})
    state = load_file(path)
    for changes in ({"network_args": words}, {"dim_from_weights": True}):
        again = install(options(network_weights=path, **changes), lumina_like())
        assert all(torch.equal(tensor, state[key]) for key, tensor in again.export_state().items())
    with pytest.raises(CheckpointError, match="is a DoRA and this network is none; .* --dim_from_weights"):
        install(options(network_weights=path), lumina_like())
    with pytest.raises(CheckpointError, match=r"dora_scale' has shape \(20, 1\), .* needs \(1, 12\)"):
        install(options(network_weights=path, network_args=words[:1]), lumina_like())
    with pytest.raises(ConfigError, match="alphas and kind are those"):
        from networks.module import check_network

        check_network(options(network_weights=path, dim_from_weights=True, network_args=words))


def test_split_magnitudes_of_columns_are_those_of_the_fused_layer() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(12, 20))
    lora = SplitLoRA(12, (12, 4, 4), 2, 1.0, magnitude=Magnitude(layer.base.weight, on_output=False))
    lora.reset(1, "layer")
    train(lora)
    layer.loras = (lora,)
    x = torch.randn(5, 12)
    expected = F.linear(x, as_readers_do(layer.base.weight, lora.to_file()), layer.base.bias)
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_pefts_own_file_is_read(lumina_like: Make, inputs: tuple[Tensor, ...], tmp_path: Path) -> None:
    ours, theirs = lumina_like(), lumina_like()
    targets = ["layers.0.attention.qkv", "layers.1.feed_forward.w2", "x_embedder"]
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=targets, use_dora=True, init_lora_weights=False
    )
    adapted = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.3)
    adapted.save_pretrained(tmp_path)
    assert any("lora_magnitude_vector" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    expected = adapted(*inputs)
    network = create_network_from_file(ours, tmp_path)
    network.apply_to(ours)
    assert torch.allclose(ours(*inputs), expected, atol=1e-4)


def test_q_k_and_v_of_a_dora_are_joined(tmp_path: Path) -> None:
    state = {}
    for part, width in zip("qkv", (12, 4, 4), strict=True):
        module = f"transformer.layers.0.attn.to_{part}"
        state |= {
            f"{module}.lora_A.weight": torch.randn(2, 12),
            f"{module}.lora_B.weight": torch.randn(width, 2),
        }
        state[f"{module}.lora_magnitude_vector"] = torch.rand(width) + 1
    save_file(state, tmp_path / "lora.safetensors")
    file = inspect_lora(tmp_path / "lora.safetensors")
    name = "lora_unet_layers_0_attention_qkv"
    assert (file.ranks, file.doras) == ({name: 6}, {name: "output"})
    read = file.read()
    rows = torch.cat([state[f"transformer.layers.0.attn.to_{part}.lora_magnitude_vector"] for part in "qkv"])
    assert torch.equal(read[f"{name}.dora_scale"], rows[:, None])
    del state["transformer.layers.0.attn.to_k.lora_magnitude_vector"]
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="only if all three have a magnitude for each output feature"):
        inspect_lora(tmp_path / "lora.safetensors")
