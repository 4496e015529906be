"""Every way of running blocks gives the same numbers; they differ in what is kept for backward."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from library.models.nextdit import NextDiT
from library.nn import products
from library.nn.running.runner import MODES
from library.nn.swap.block_swap import BlockSwap
from library.nn.weights.quant import QuantLinear
from library.nn.weights.schemes import SCHEMES
from networks.layer import Dropouts
from networks.lora import LoRANetwork, LoRASize, linear_layers
from tests.models.lumina2_pairs import make_inputs, make_params

CPU = torch.device("cpu")


def make_model(dtype=torch.float32, *, dropout=0.0, **changes):
    """A model with a LoRA on every layer of its blocks; nothing is zero."""
    torch.manual_seed(0)
    model = NextDiT(make_params(**changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=weight.shape[1] ** -0.5) if weight.dim() == 2 else weight.normal_(1.0, 0.1)
    model.requires_grad_(False).to(dtype).t_embedder.float()
    paths = (p for p in linear_layers(model) if ".attention." in p or ".feed_forward." in p or "_mod" in p)
    network = LoRANetwork(model, {path: LoRASize(4, 4) for path in paths})
    network.apply_to(model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    for lora in network.loras.values():
        lora.dropouts = Dropouts(neuron=dropout, module=dropout)
    return model, network.train()


def train(model, network, inputs):
    """Output and gradients of a step, and what is left of the random numbers."""
    network.zero_grad()
    torch.manual_seed(5)
    output = inputs.ours(model)
    output.float().square().sum().backward()
    grads = [p.grad if p.grad is not None else torch.zeros(()) for p in network.parameters()]
    return [output.detach(), *grads, torch.rand(3)]


def assert_same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("dtype", "fast", "dropout"),
    [(torch.float32, True, 0.3), (torch.bfloat16, True, 0.0), (torch.bfloat16, False, 0.3)],
    ids=["fp32 with dropout", "bf16", "bf16 multiplied in fp32, with dropout"],
)
def test_bit_for_bit(monkeypatch, dtype, fast, dropout):
    monkeypatch.setattr(products, "_cpu_is_fast_in", lambda _: fast)
    model, network = make_model(dtype, dropout=dropout)
    inputs = make_inputs(model.params, (9, 1, 40), (8, 6))
    expected = train(model, network, inputs)
    for mode in MODES:
        model.runner.keep(mode)
        assert_same(expected, train(model, network, inputs))


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_quantised_layers_that_have_no_lora(scheme):
    """Their operation is one of its own, where a checkpoint lets what was kept be read once."""
    model, network = make_model()
    network.remove()
    for path, layer in linear_layers(model).items():
        if ".attention." in path or ".feed_forward." in path:
            parent, _, leaf = path.rpartition(".")
            quantised = QuantLinear(layer.in_features, layer.out_features, layer.bias is not None, scheme)
            quantised.quantise(layer.weight, CPU)
            setattr(model.get_submodule(parent), leaf, quantised)
    network = LoRANetwork(model, {path: LoRASize(4, 4) for path in linear_layers(model) if "out" in path})
    network.apply_to(model)
    torch.nn.init.normal_(next(network.parameters()))
    inputs = make_inputs(model.params, (9, 1, 40), (8, 6))
    expected = train(model, network, inputs)
    assert any(grad.abs().max() > 0 for grad in expected[1:-1])
    for mode in MODES:
        model.runner.keep(mode)
        assert_same(expected, train(model, network, inputs))


@pytest.mark.parametrize("ring_size", [1, 2])
def test_bit_for_bit_with_weights_that_come_and_go(ring_size):
    model, network = make_model(n_layers=3, dropout=0.3)
    inputs = make_inputs(model.params, (9, 4), (8, 6))
    expected = train(model, network, inputs)
    model.runner.ring = BlockSwap(model.runner.blocks, CPU, ring_size=ring_size)
    for mode in MODES:
        model.runner.keep(mode)
        assert_same(expected, train(model, network, inputs))
        with torch.no_grad():
            inputs.ours(model)  # a preview in between


def kept_bytes(model, inputs):
    """Bytes that the blocks keep for backward, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        alive = inputs.ours(model)
    del alive
    return sum(sizes.values())


def test_what_is_kept():
    """With the real model's proportions: some 18 widths of a token in all, of it 12 in the feed-forward."""
    sizes = {"dim": 96, "n_heads": 4, "n_kv_heads": 1, "head_dim": 24, "axes_dims": (8, 8, 8), "ffn_dim": 384}
    model, _ = make_model(n_layers=4, **sizes)
    inputs = make_inputs(model.params, (16,), (16, 16))
    kept = {}
    for mode in MODES:
        model.runner.keep(mode)
        kept[mode] = kept_bytes(model, inputs)
    assert 0.7 < kept["selective"] / kept["none"] < 0.85
    assert 0.3 < kept["feed_forward"] / kept["none"] < 0.45
    assert 0.2 < kept["outputs"] / kept["none"] < 0.33
    assert kept["full"] < 0.1 * kept["none"]
    model.runner.keep("full", every=2)
    assert 0.5 < kept_bytes(model, inputs) / kept["none"] < 0.7


def test_every_nth_block():
    model, _ = make_model(n_layers=3)
    runner = model.runner
    assert [*runner.blocks] == [*model.context_refiner, *model.noise_refiner, *model.layers]
    runner.keep("full", every=2)
    assert [runner.mode_of(block) for block in runner.blocks] == ["full", "none", "full", "none", "full"]
    runner.keep("full", every=2, between="selective")
    assert [runner.mode_of(b) for b in runner.blocks] == ["full", "selective", "full", "selective", "full"]
    runner.keep_of(model.layers[0], "offload")
    assert runner.mode_of(model.layers[0]) == "offload"
    runner.keep("selective")
    assert {runner.mode_of(block) for block in runner.blocks} == {"selective"}


def test_without_gradients_a_block_is_just_run():
    model, _ = make_model()
    model.runner.keep("outputs")
    inputs = make_inputs(model.params, (9,), (8, 6))
    with torch.no_grad(), saved_tensors_hooks(pytest.fail, pytest.fail):
        assert not inputs.ours(model).requires_grad
