"""The LoRA layer against plain operations and peft, and under checkpointing and dropout."""

from __future__ import annotations

import math

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.nn.activations import GELU, SWIGLU, Activation
from library.nn.products import Linear
from library.nn.together import activated, together
from networks.layer import Dropouts, LoRA, LoRALinear
from networks.lora_op import Constants, LoRAOperand, linear_with_loras, low_rank

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make_layer(
    in_features: int = 12, out_features: int = 20, rank: int = 3, *, bias: bool = True, dtype=torch.float32
) -> tuple[LoRALinear, LoRA]:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(in_features, out_features, bias=bias, dtype=dtype))
    lora = LoRA(in_features, out_features, rank, alpha=2.0)
    lora.reset(seed=1, name="layer")
    nn.init.normal_(lora.up)
    layer.loras = (lora,)
    return layer, lora


def plainly(layer: LoRALinear, x: Tensor) -> Tensor:
    lora = layer.loras[0]
    rows = x.reshape(-1, x.shape[-1])
    y = F.linear(rows, layer.base.weight, layer.base.bias) + low_rank(rows, lora.down, lora.up, lora.scale)
    return y.view(*x.shape[:-1], -1)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 5, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_agrees_with_plain_operations(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    layer, lora = make_layer(bias=bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    target = torch.randn(*shape[:-1], 20, dtype=dtype)
    results = []
    for forward in (layer, lambda x: plainly(layer, x)):
        y = forward(x)
        grads = torch.autograd.grad((y * target).sum(), (x, lora.down, lora.up))
        results.append((y, *grads))
    for fast, plain in zip(*results, strict=True):
        assert fast.dtype == plain.dtype and fast.shape == plain.shape
        assert relative(fast, plain) < TOLERANCE[dtype]
    assert results[0][2].dtype == results[0][3].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_multiplies_as_its_base_layer_does(dtype: torch.dtype) -> None:
    """Half-precision layers of the model may multiply in fp32; with a LoRA of zeros, no bit may change."""
    torch.manual_seed(0)
    base = Linear(96, 160, dtype=dtype)
    layer, lora = LoRALinear(base), LoRA(96, 160, rank=4, alpha=4)
    lora.reset(seed=1, name="layer")
    layer.loras = (lora,)
    for rows in (1, 31, 32, 200):
        x = torch.randn(rows, 96, dtype=dtype)
        assert torch.equal(layer(x), base(x))
    nn.init.normal_(lora.up)
    x = torch.randn(200, 96, dtype=dtype, requires_grad=True)
    exact = F.linear(x.double(), (base.weight + lora.delta(base.weight)).double(), base.bias.double())
    assert relative(layer(x), exact) < TOLERANCE[dtype] / 5
    ours = torch.autograd.grad(layer(x).square().sum(), (x, lora.down, lora.up))
    plain = torch.autograd.grad(plainly(layer, x).square().sum(), (x, lora.down, lora.up))
    assert all(relative(a, b) < TOLERANCE[dtype] for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_the_derivatives(masked: bool) -> None:
    random = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64, requires_grad=True)

    weight, bias = leaf(5, 4).detach(), leaf(5).detach()
    factor = (leaf(6, 2).detach() > 0).double() * 2 if masked else 0.7

    def outputs(x: Tensor, *loras: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(loras[::2], loras[1::2], strict=True)
        operands = [LoRAOperand(down, up, Constants(bias, factor, None, (weight,))) for down, up in pairs]
        return linear_with_loras([x], operands, torch.float64)

    for count in (1, 3):
        loras = [leaf(*shape) for _ in range(count) for shape in ((2, 4), (5, 2))]
        assert torch.autograd.gradcheck(outputs, (leaf(6, 4), *loras))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9), features=st.tuples(st.integers(1, 9), st.integers(1, 9)), rank=st.integers(1, 12)
)
def test_any_size_agrees_with_plain_operations(rows: int, features: tuple[int, int], rank: int) -> None:
    layer, _ = make_layer(*features, rank, dtype=torch.float64)
    x = torch.randn(rows, features[0], dtype=torch.float64)
    assert torch.allclose(layer(x), plainly(layer, x), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropouts", [Dropouts(), Dropouts(neuron=0.4), Dropouts(rank=0.3)])
def test_layers_with_one_input_are_computed_together(dtype: torch.dtype, dropouts: Dropouts) -> None:
    torch.manual_seed(0)
    layers, weights = [], []
    for number, (width, rank) in enumerate([(64, 4), (48, 8), (48, 2)]):
        layers.append(LoRALinear(Linear(32, width, bias=number != 1, dtype=dtype)))
        lora = LoRA(32, width, rank, alpha=2.0)
        lora.reset(seed=number, name="layer")
        nn.init.normal_(lora.up)
        lora.dropouts = dropouts
        layers[-1].loras = (lora,)
        weights += [lora.down, lora.up]
    x = torch.randn(2, 40, 32, dtype=dtype, requires_grad=True)
    targets = [torch.randn(2, 40, width, dtype=dtype) for width in (64, 48, 48)]
    results = []
    for forward in (together, lambda x, *layers: tuple(layer(x) for layer in layers)):
        torch.manual_seed(5)  # dropout
        outputs = forward(x, *layers)
        loss = sum((y * target).sum() for y, target in zip(outputs, targets, strict=True))
        results.append((*outputs, *torch.autograd.grad(loss, (x, *weights))))
    assert len({y.grad_fn.next_functions[0][0] for y in results[0][:3]}) == 1
    for fast, plain in zip(*results, strict=True):
        assert fast.dtype == plain.dtype and fast.shape == plain.shape
        assert relative(fast, plain) < TOLERANCE[dtype]


def test_layers_that_cannot_be_joined_are_computed_one_by_one() -> None:
    layer, lora = make_layer()
    other, dropped = make_layer()
    x = torch.randn(7, 12)
    expected = (layer(x), layer(x))

    def one_by_one() -> bool:
        outputs = together(x, layer, other)
        assert torch.allclose(outputs[0], expected[0], atol=1e-6)
        return outputs[0].grad_fn is not outputs[1].grad_fn

    assert not one_by_one()
    dropped.dropouts = Dropouts(module=0.5)
    assert one_by_one()
    dropped.dropouts = Dropouts()
    dropped.set_strength(0.0)
    assert one_by_one()
    dropped.set_strength(1.0)
    other.loras = (lora, dropped)
    assert one_by_one()
    other.loras = ()
    assert one_by_one()
    bare = nn.Linear(12, 3)
    assert torch.equal(together(x, layer, bare)[1], bare(x))
    assert torch.equal(together(x, bare, layer)[1], layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropouts", [Dropouts(), Dropouts(neuron=0.4), Dropouts(rank=0.3)])
@pytest.mark.parametrize(("activation", "count"), [(SWIGLU, 2), (GELU, 1)], ids=["SwiGLU", "GELU"])
def test_a_layer_is_computed_with_the_activation_before_it(
    activation: Activation, count: int, dtype: torch.dtype, dropouts: Dropouts
) -> None:
    layer, lora = make_layer(dtype=dtype)
    lora.dropouts = dropouts
    inputs = [torch.randn(2, 40, 12, dtype=dtype, requires_grad=True) for _ in range(count)]
    target = torch.randn(2, 40, 20, dtype=dtype)
    results = []
    for forward in (
        lambda: activated(activation, inputs, layer),
        lambda: layer(activation.value(*inputs)),
    ):
        torch.manual_seed(5)  # dropout
        y = forward()
        results.append((y, *torch.autograd.grad((y * target).sum(), (*inputs, lora.down, lora.up))))
    for fast, plain in zip(*results, strict=True):
        assert fast.dtype == plain.dtype and fast.shape == plain.shape
        assert relative(fast, plain) < TOLERANCE[dtype]


@pytest.mark.parametrize(("activation", "count"), [(SWIGLU, 2), (GELU, 1)], ids=["SwiGLU", "GELU"])
def test_of_an_activation_the_inputs_are_kept(activation: Activation, count: int) -> None:
    layer, lora = make_layer(bias=False)
    inputs = [torch.randn(40, 12, requires_grad=True) for _ in range(count)]
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive = activated(activation, inputs, layer)
    for tensor in (layer.base.weight, lora.down, lora.up):
        kept.pop(tensor.untyped_storage().data_ptr())
    assert sum(kept.values()) == count * 40 * 12 + 40 * lora.rank and alive.requires_grad


def test_gradients_through_an_activation_are_derivatives() -> None:
    layer, lora = make_layer(4, 5, rank=2, dtype=torch.float64)
    lora.double()
    a, b = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def output(a: Tensor, b: Tensor, down: Tensor, up: Tensor) -> Tensor:
        operand = LoRAOperand(down, up, Constants(layer.base.bias, 0.7, None, (layer.base.weight,)))
        return linear_with_loras([a, b], [operand], torch.float64, SWIGLU)[0]

    loras = lora.down, lora.up
    assert torch.autograd.gradcheck(output, (a, b, *loras))
    assert torch.autograd.gradcheck(lambda *i: output(a.detach(), b.detach(), *i), loras)
    frozen = lora.down.detach(), lora.up.detach()
    assert torch.autograd.gradcheck(lambda *i: output(*i, *frozen), (a, b))


def test_no_rows_at_all_are_no_error() -> None:
    layer, lora = make_layer()
    x = torch.randn(0, 12, requires_grad=True)
    activated(GELU, [x], layer).sum().backward()
    assert x.grad.shape == (0, 12) and not lora.down.grad.any() and not lora.up.grad.any()


def test_a_layer_that_cannot_be_joined_with_an_activation_follows_it() -> None:
    layer, lora = make_layer()
    x, bare = torch.randn(7, 12), nn.Linear(12, 3)
    assert torch.equal(activated(GELU, [x], bare), bare(F.gelu(x)))
    for change in (Dropouts(module=1.0), Dropouts()):
        lora.dropouts = change
        lora.set_strength(0.0 if change == Dropouts() else 1.0)
        assert torch.equal(activated(GELU, [x], layer), layer.base(F.gelu(x)))
    other, _ = make_layer()
    lora.set_strength(1.0)
    layer.loras += other.loras
    assert torch.allclose(activated(GELU, [x], layer), layer(F.gelu(x)))


def test_agrees_with_peft() -> None:
    layer, lora = make_layer(rank=4)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(12, 20)),
        peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0"]),
    )
    theirs = model.base_model.model[0]
    with torch.no_grad():
        theirs.base_layer.weight.copy_(layer.base.weight)
        theirs.base_layer.bias.copy_(layer.base.bias)
        theirs.lora_A["default"].weight.copy_(lora.down)
        theirs.lora_B["default"].weight.copy_(lora.up)
    x = torch.randn(2, 7, 12, requires_grad=True)
    target = torch.randn(2, 7, 20)
    ours_y, theirs_y = layer(x), model(x)
    ours = torch.autograd.grad((ours_y * target).sum(), (x, lora.down, lora.up))
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    expected = torch.autograd.grad((theirs_y * target).sum(), (x, a, b))
    assert relative(ours_y, theirs_y) < 1e-6
    assert all(relative(mine, other) < 1e-6 for mine, other in zip(ours, expected, strict=True))


def test_no_gradient_is_computed_for_an_input_that_needs_none() -> None:
    layer, lora = make_layer()
    layer(torch.randn(7, 12)).sum().backward()
    assert lora.down.grad is not None and lora.up.grad is not None
    assert layer.base.weight.grad is None and not layer.base.weight.requires_grad


def test_gradient_reaches_the_input_through_a_frozen_lora() -> None:
    layer, lora = make_layer()
    lora.requires_grad_(False)
    x = torch.randn(7, 12, requires_grad=True)
    layer(x).sum().backward()
    merged = layer.base.weight + lora.delta(layer.base.weight)
    assert torch.allclose(x.grad, merged.sum(dim=0).expand(7, -1), atol=1e-5)
    assert lora.down.grad is None and lora.up.grad is None


def test_keeps_nothing_wider_than_the_input_for_backward() -> None:
    layer, lora = make_layer(in_features=64, out_features=256, rank=4)
    x = torch.randn(1000, 64, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    weights = sum(w.nbytes for w in (layer.base.weight, lora.down, lora.up))
    hidden = 1000 * 4 * 4
    assert sum(kept.values()) <= x.nbytes + hidden + weights


def test_output_may_be_changed_in_place() -> None:
    layer, _ = make_layer()
    for x in (torch.randn(7, 12), torch.randn(2, 7, 12)):
        x.requires_grad_()
        expected = torch.autograd.grad((plainly(layer, x) * 3).sum(), x)[0]
        assert torch.allclose(torch.autograd.grad(layer(x).mul_(3).sum(), x)[0], expected, atol=1e-5)


@pytest.mark.parametrize("dropouts", [Dropouts(), Dropouts(neuron=0.4, rank=0.3, module=0.3)])
def test_checkpointing_changes_nothing(dropouts: Dropouts) -> None:
    layer, lora = make_layer()
    lora.dropouts = dropouts
    x = torch.randn(2, 7, 12, requires_grad=True)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        for seed in range(5):
            torch.manual_seed(seed)
            y = run(x) * x.mean()
            gradients.append(torch.autograd.grad(y.sum(), (x, lora.down, lora.up), allow_unused=True))
    for plain, checkpointed in zip(gradients[:5], gradients[5:], strict=True):
        for a, b in zip(plain, checkpointed, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("dropouts", [Dropouts(neuron=0.5), Dropouts(rank=0.5), Dropouts(module=0.5)])
def test_dropout_draws_in_training_only_and_from_the_global_generator(dropouts: Dropouts) -> None:
    layer, lora = make_layer()
    lora.dropouts = dropouts
    x = torch.randn(4, 6, 12)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(run(1), run(1))
    assert any(not torch.equal(run(0), run(seed)) for seed in range(1, 8))
    lora.eval()
    assert torch.equal(run(1), run(2))
    assert torch.allclose(run(1), plainly(layer, x), atol=1e-5)


def test_rank_dropout_draws_once_for_each_sample() -> None:
    lora = LoRA(12, 20, rank=8, alpha=8)
    lora.dropouts = Dropouts(rank=0.5)
    torch.manual_seed(0)
    mask = lora.draw_factor(torch.randn(5, 6, 12)).view(5, 6, 8)
    assert torch.equal(mask, mask[:, :1].expand_as(mask))
    assert len({tuple(sample.tolist()) for sample in mask[:, 0]}) > 1
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    assert lora.draw_factor(torch.randn(30, 12)).shape == (1, 8)


def test_dropout_keeps_the_mean() -> None:
    layer, lora = make_layer(rank=8, dtype=torch.float64)
    lora.dropouts = Dropouts(neuron=0.3, rank=0.2)
    x = torch.randn(6, 12, dtype=torch.float64)
    torch.manual_seed(0)
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(dim=0)
    assert relative(mean - layer.base(x), plainly(layer, x) - layer.base(x)) < 0.06


def test_start_is_kohyas_and_a_function_of_seed_and_name() -> None:
    def started(seed: int, name: str) -> LoRA:
        lora = LoRA(64, 8, rank=16, alpha=None)
        lora.reset(seed, name)
        return lora

    one = started(5, "a")
    torch.manual_seed(1234)  # the global generator has no say
    assert torch.equal(one.down, started(5, "a").down)
    assert not torch.equal(one.down, started(5, "b").down)
    assert not torch.equal(one.down, started(6, "a").down)
    bound = 1 / math.sqrt(64)
    assert one.down.abs().max() <= bound and one.down.abs().max() > 0.95 * bound
    assert abs(one.down.std().item() - bound / math.sqrt(3)) < 0.05 * bound
    assert not one.up.any()


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0, 1.0), (1, 0.25), (8, 2.0)])
def test_scale_is_alpha_over_rank(alpha: float | None, scale: float) -> None:
    assert LoRA(12, 20, rank=4, alpha=alpha).scale == scale
