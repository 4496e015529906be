"""Quantised weights: what comes back, what a layer computes with it, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from library.core.errors import ConfigError
from library.nn.weights.quant import QuantLinear, use_quant_layers
from library.nn.weights.schemes import _NF4, SCHEMES

# The mean square error of a normal distribution's weights, relative: measured bounds with a little room.
LIMITS = {"fp8": 0.03, "int8": 0.01, "int4": 0.09, "nf4": 0.10}
BITS = {"fp8": 8, "int8": 8, "int4": 4.5, "nf4": 4.25}


def _weight(rows: int = 128, columns: int = 192) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.05


@pytest.mark.parametrize("name", SCHEMES)
def test_the_weight_comes_back_nearly(name: str) -> None:
    weight = _weight()
    restored = SCHEMES[name].unpack(SCHEMES[name].pack(weight), torch.float32)
    assert restored.shape == weight.shape
    assert (restored - weight).norm() / weight.norm() < LIMITS[name]


@pytest.mark.parametrize("name", SCHEMES)
def test_what_was_quantised_once_is_quantised_without_further_loss(name: str) -> None:
    scheme = SCHEMES[name]
    once = scheme.unpack(scheme.pack(_weight()), torch.float32)
    twice = scheme.unpack(scheme.pack(once), torch.float32)
    assert (twice - once).norm() / once.norm() < 0.01


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_of_zeros_stay_zeros(name: str) -> None:
    weight = _weight()
    weight[3] = 0
    assert torch.equal(SCHEMES[name].unpack(SCHEMES[name].pack(weight), torch.float32)[3], torch.zeros(192))


@pytest.mark.parametrize("name", SCHEMES)
def test_an_outlier_spoils_its_own_row_only(name: str) -> None:
    weight = _weight()
    plain = SCHEMES[name].unpack(SCHEMES[name].pack(weight), torch.float32)
    weight[5, 7] = 100.0
    spoilt = SCHEMES[name].unpack(SCHEMES[name].pack(weight), torch.float32)
    others = [row for row in range(len(weight)) if row != 5]
    assert torch.equal(plain[others], spoilt[others])


@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_of_the_stored_form(name: str) -> None:
    stored = SCHEMES[name].pack(_weight(256, 1024))
    bits = 8 * sum(tensor.nbytes for tensor in stored) / (256 * 1024)
    assert bits == pytest.approx(BITS[name], abs=0.04)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_a_plain_one_with_the_restored_weight(name: str, dtype: torch.dtype, bias: bool) -> None:
    layer = QuantLinear(192, 128, bias, name)
    layer.quantise(_weight(), torch.device("cpu"))
    if bias:
        torch.nn.init.normal_(layer.bias)
    plain = torch.nn.Linear(192, 128, bias=bias)
    plain.weight.data, plain.bias = layer.weight, layer.bias
    x = torch.randn(40, 192, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    y, reference = layer(x), plain(wide)
    y.float().square().sum().backward()
    reference.square().sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), reference, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(x.grad.float(), wide.grad, atol=10 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", SCHEMES)
def test_only_the_stored_form_is_kept_for_backward(name: str) -> None:
    layer = QuantLinear(192, 128, False, name)
    layer.quantise(_weight(), torch.device("cpu"))
    own = {tensor.data_ptr() for tensor in layer.stored}
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        layer(torch.randn(40, 192, requires_grad=True))
    assert set(kept) == own


def test_the_reported_error_is_that_of_the_weight() -> None:
    layer, weight = QuantLinear(192, 128, False, "int4"), _weight()
    error = layer.quantise(weight, torch.device("cpu"))
    assert error == pytest.approx(((layer.weight - weight).norm() / weight.norm()).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_every_byte_stands_for_two_numbers(name: str, dtype: torch.dtype) -> None:
    """The lower half for the first, in one group of 512."""
    packed = torch.arange(256, dtype=torch.uint8).unsqueeze(0)
    codes = torch.stack((packed % 16, packed // 16), -1).flatten(1).long()
    scale, low = torch.full((1, 1, 1), 0.75, dtype=torch.bfloat16), torch.zeros(1, 1, 1, dtype=torch.bfloat16)
    numbers = {"nf4": torch.tensor(_NF4, dtype=dtype), "int4": torch.arange(16).to(dtype)}[name]
    stored = {"nf4": (packed, scale), "int4": (packed, scale, low)}[name]
    for _ in range(2):  # the table is kept, and stays as it is
        assert torch.equal(SCHEMES[name].unpack(stored, dtype), numbers[codes] * scale.to(dtype).item())


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_without_content_are_restored_in_one_mode_after_another(name: str) -> None:
    """As memory is foretold: tables that are kept must not be of a mode that has ended."""
    stored = [tensor.to("meta") for tensor in SCHEMES[name].pack(_weight())]
    for _ in range(2):
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(tensor) for tensor in stored]
            assert SCHEMES[name].unpack(fake, torch.bfloat16).shape == (128, 192)
        assert type(SCHEMES[name].unpack(stored, torch.bfloat16)) is torch.Tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_number_in_fp8(dtype: torch.dtype) -> None:
    """Of a width that goes in pairs, and of one that does not."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).unsqueeze(0)
    scale = torch.full((1, 1), 0.75)
    expected = codes.to(dtype) * 0.75
    for width in (256, 255):
        ours = SCHEMES["fp8"].unpack((codes[:, :width], scale), dtype)
        torch.testing.assert_close(ours, expected[:, :width], rtol=0, atol=0, equal_nan=True)


def test_a_width_that_cannot_be_grouped() -> None:
    with pytest.raises(ConfigError, match="100 inputs cannot be quantised to nf4"):
        QuantLinear(100, 8, False, "nf4")


def test_layers_are_replaced_empty() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.SiLU(), torch.nn.Linear(32, 16))
    use_quant_layers(model, ["2"], "int8")
    assert isinstance(model[2], QuantLinear) and not isinstance(model[0], QuantLinear)
    assert {tensor.device.type for tensor in model[2].stored} == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEMES)
def test_a_product_waits_for_no_gpu(name: str) -> None:
    layer = QuantLinear(192, 128, True, name)
    layer.quantise(_weight(), torch.device("cpu"))
    layer.to("cuda")
    x = torch.randn(20, 192, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
        SCHEMES[name].unpack(layer.stored, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
