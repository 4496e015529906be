"""The dtype of products, and the linear layer that widens its factors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from library.nn import products
from library.nn.products import Conv2d, Fp32Linear, Linear, layer_dtype, product_dtype
from networks.layer import LoRA, LoRALinear

ROWS = 40


@pytest.fixture
def slow_half(monkeypatch):
    """A processor that is slow in half precision, whatever this one is."""
    monkeypatch.setattr(products, "_cpu_is_fast_in", lambda dtype: False)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "cpu_name": "Intel Xeon", "avx512_bf16": True}, torch.float32),
        ({"architecture": "x86_64", "cpu_name": "Intel Xeon", "amx_bf16": True}, torch.bfloat16),
        ({"architecture": "x86_64", "cpu_name": "AMD EPYC", "avx512_bf16": True}, torch.bfloat16),
        ({"architecture": "x86_64", "cpu_name": "AMD Ryzen", "avx2": True}, torch.float32),
        ({"architecture": "aarch64", "bf16": True}, torch.bfloat16),
        ({"architecture": "aarch64"}, torch.float32),
    ],
    ids=lambda value: str(value.get("cpu_name", "Arm")) if isinstance(value, dict) else str(value),
)
def test_bf16_is_multiplied_where_the_processor_is_good_at_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(products, "_CPU", capabilities)
    assert product_dtype(torch.zeros(1, dtype=torch.bfloat16)) == expected


def test_other_dtypes_and_devices_are_left_alone(slow_half):
    assert product_dtype(torch.zeros(1)) == torch.float32
    assert product_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64
    assert product_dtype(torch.zeros(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16


def test_few_rows_are_not_worth_it(slow_half):
    assert layer_dtype(torch.zeros(2, 3, 8, dtype=torch.bfloat16)) == torch.bfloat16
    assert layer_dtype(torch.zeros(2, 50, 8, dtype=torch.bfloat16)) == torch.float32


def linear(dtype, bias=True):
    torch.manual_seed(0)
    return Linear(12, 7, bias=bias).to(dtype)


def test_fp32_is_an_ordinary_linear_layer():
    layer, x = linear(torch.float32), torch.randn(ROWS, 12)
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(ROWS, 12), (4, ROWS // 4, 12)])
def test_wide_products_are_rounded_once(slow_half, bias, shape):
    layer, x = linear(torch.bfloat16, bias), torch.randn(shape).bfloat16().requires_grad_()
    y = layer(x)
    grad = torch.randn(y.shape).bfloat16()
    exact = [p.detach().double().requires_grad_() for p in (x, *layer.parameters())]
    y_exact = F.linear(*exact)
    assert (y != y_exact.float().bfloat16()).float().mean() < 0.01
    ours = torch.autograd.grad(y, [x, *layer.parameters()], grad)
    for one, other in zip(ours, torch.autograd.grad(y_exact, exact, grad.double()), strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other.bfloat16(), rtol=8e-3, atol=1e-6)


def test_a_frozen_layer_does_not_keep_its_input(slow_half):
    layer, x = linear(torch.bfloat16).requires_grad_(False), torch.randn(ROWS, 12).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        layer(x)
    assert kept == [layer.weight.shape]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "bias": False}])
def test_convolution_rounds_once(slow_half, dtype, options):
    torch.manual_seed(0)
    layer = Conv2d(6, 5, 3, **options).to(dtype)
    x = torch.randn(2, 6, 9, 8).to(dtype)
    exact = F.conv2d(
        x.double(),
        layer.weight.double(),
        None if layer.bias is None else layer.bias.double(),
        layer.stride,
        layer.padding,
    )
    out = layer(x)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps / 2 * exact.abs().max() * 1.001


def test_convolution_is_torchs_where_half_precision_is_fast(monkeypatch):
    monkeypatch.setattr(products, "_cpu_is_fast_in", lambda dtype: True)
    layer, x = Conv2d(3, 4, 3).bfloat16(), torch.randn(1, 3, 8, 8).bfloat16()
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_fp32_linear_computes_in_fp32_whatever_it_is_kept_in(dtype, bias):
    torch.manual_seed(0)
    layer, x = Fp32Linear(12, 7, bias=bias).to(dtype), torch.randn(3, 12, requires_grad=True)
    reference = nn.Linear(12, 7, bias=bias).to(dtype)
    reference.load_state_dict(layer.state_dict())
    if dtype == torch.float64:
        x = x.detach().double().requires_grad_()
    else:
        reference.float()
    outcomes = []
    for each in (layer, reference):
        output = each(x)
        grads = torch.autograd.grad(output.square().sum(), (x, *each.parameters()))
        outcomes.append((output.detach(), *grads))
    assert outcomes[0][0].dtype == x.dtype and [g.dtype for g in outcomes[0][2:]] == [dtype] * (1 + bias)
    for ours, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, plain.to(ours.dtype))


def test_fp32_linear_widens_its_input_and_keeps_no_wide_weight():
    layer, x = (
        Fp32Linear(12, 7).to(torch.bfloat16).requires_grad_(False),
        torch.randn(3, 12, requires_grad=True),
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = layer(x.bfloat16())
    assert output.dtype == torch.float32
    assert {t.dtype for t in kept if t.shape == (7, 12)} == {torch.bfloat16}


def test_a_lora_on_an_fp32_linear_is_fp32_too():
    layer = Fp32Linear(12, 7).to(torch.bfloat16)
    carrier = LoRALinear(layer)
    carrier.loras = (lora := LoRA(12, 7, 4, 4),)
    nn.init.normal_(lora.up)
    nn.init.normal_(lora.down)
    x = torch.randn(3, 12)
    expected = F.linear(x, layer.weight.float() + lora.up @ lora.down, layer.bias.float())
    torch.testing.assert_close(carrier(x), expected)
