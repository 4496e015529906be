"""Products of codes in 8 bits: what they are, how far from those with restored weights, and who has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from library.core.errors import ConfigError
from library.nn.weights import eight_bit
from library.nn.weights.quant import QuantLinear, multiply_in_8_bits
from library.nn.weights.schemes import SCHEMES
from library.options.quant import PRODUCTS, QuantOptions
from networks.layer import LoRA, LoRALinear

INPUTS, OUTPUTS = 192, 128
LIMITS = {"int8": 0.01, "fp8": 0.04}  # relative to the norm; measured 0.007 and 0.027
LARGEST = {"int8": 127, "fp8": 448}


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(scheme: str, *, bias: bool = False, fast: bool = True) -> QuantLinear:
    made = QuantLinear(INPUTS, OUTPUTS, bias, scheme)
    made.quantise(numbers(OUTPUTS, INPUTS) * 0.05, torch.device("cpu"))
    if bias:
        made.bias.data = numbers(OUTPUTS, seed=5)
    made.multiplies_in_8_bits = fast
    return made


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def rounded(x: Tensor, scheme: str) -> Tensor:
    """What is left of the rows of x when they are codes, in fp64."""
    scale = x.abs().amax(1, keepdim=True) / LARGEST[scheme]
    codes = (x / scale).round() if scheme == "int8" else (x / scale).to(torch.float8_e4m3fn)
    return codes.double() * scale.double()


@pytest.mark.parametrize("scheme", PRODUCTS)
def test_a_product_is_that_of_the_rounded_factors(scheme: str) -> None:
    made, x, grad = layer(scheme), numbers(40, INPUTS, seed=2), numbers(40, OUTPUTS, seed=3)
    codes, scale = made.stored
    weight = codes.double() * scale.double()
    ours = eight_bit.multiply(x, codes, scale)
    assert distance(ours.double(), rounded(x, scheme) @ weight.t()) < 1e-6
    back = eight_bit.multiply_back(grad, codes, scale)
    assert distance(back.double(), rounded(grad * scale.t(), scheme) @ codes.double()) < 1e-6


@pytest.mark.parametrize("scheme", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True], ids=["base", "with a LoRA"])
def test_output_and_gradients_are_near_those_of_restored_weights(
    scheme: str, dtype: torch.dtype, lora: bool
) -> None:
    """Rows of very different size, as tokens and their gradients are."""
    sizes = torch.logspace(-3, 2, 40)[:, None]
    found = []
    for fast in (True, False):
        made: nn.Module = layer(scheme, bias=True, fast=fast)
        if lora:
            made = LoRALinear(made)
            made.loras = (LoRA(INPUTS, OUTPUTS, 4, 4.0),)
            made.loras[0].reset(1, "it")
            nn.init.normal_(made.loras[0].up, std=0.1, generator=torch.Generator().manual_seed(4))
        x = (numbers(40, INPUTS, seed=2) * sizes).to(dtype).requires_grad_()
        y = made(x)
        y.backward((numbers(40, OUTPUTS, seed=3) * sizes.flip(0)).to(dtype))
        trained = [made.loras[0].down.grad, made.loras[0].up.grad] if lora else []
        found.append([y.detach().float(), x.grad.float(), *trained])
    more = 0.01 if dtype == torch.bfloat16 else 0
    for fast, exact in zip(*found, strict=True):
        assert distance(fast, exact) < LIMITS[scheme] + more
    for fast, exact in zip(found[0][1], found[1][1], strict=True):  # no row of the gradient is lost
        assert distance(fast, exact) < 2 * LIMITS[scheme] + 2 * more
    assert not torch.equal(found[0][0], found[1][0])
    if lora:  # the LoRA's own gradients do not go through the codes
        assert all(torch.equal(a, b) for a, b in zip(found[0][2:], found[1][2:], strict=True))


@pytest.mark.parametrize("scheme", PRODUCTS)
def test_rows_of_zeros_give_zeros(scheme: str) -> None:
    x = numbers(20, INPUTS)
    x[3] = 0
    assert torch.equal(layer(scheme)(x)[3], torch.zeros(OUTPUTS))


@pytest.mark.parametrize("scheme", PRODUCTS)
def test_what_kernels_do_not_take_is_multiplied_with_restored_weights(scheme: str) -> None:
    few = numbers(16, INPUTS)
    assert torch.equal(layer(scheme)(few), layer(scheme, fast=False)(few))
    narrow = QuantLinear(INPUTS, 24, False, scheme)
    narrow.take(SCHEMES[scheme].pack(numbers(24, INPUTS)))
    plain = narrow(numbers(40, INPUTS))
    found = multiply_in_8_bits(nn.Sequential(narrow, layer(scheme, fast=False)))
    assert (found.layers, found.others) == (1, 1)
    assert torch.equal(narrow(numbers(40, INPUTS)), plain)


@pytest.mark.parametrize("scheme", PRODUCTS)
@pytest.mark.parametrize("size", [1e-25, 1e-9, 1e9])
def test_rows_of_any_size_keep_their_digits(scheme: str, size: float) -> None:
    """Gradients of a mean over many numbers are small, whatever the loss is."""
    codes, scale = layer(scheme).stored
    x, grad = numbers(20, INPUTS), numbers(20, OUTPUTS, seed=3)
    for product, rows in ((eight_bit.multiply, x), (eight_bit.multiply_back, grad)):
        usual = product(rows, codes, scale)
        assert distance(product(rows * size, codes, scale) / size, usual) < LIMITS[scheme] / 10


@pytest.mark.parametrize("scheme", PRODUCTS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(scheme: str, bad: float) -> None:
    """So that a run that has come to grief is noticed."""
    x = numbers(20, INPUTS)
    x[3, 5] = bad
    finite = layer(scheme)(x).isfinite()
    assert not finite[3].any() and finite[:3].all() and finite[4:].all()


@pytest.mark.parametrize("scheme", PRODUCTS)
def test_the_error_that_is_told(scheme: str) -> None:
    model = nn.Sequential(layer(scheme, fast=False), nn.Linear(3, 3))
    found = multiply_in_8_bits(model)
    assert model[0].multiplies_in_8_bits and (found.layers, found.others) == (1, 0)
    assert LIMITS[scheme] / 2 < found.error < LIMITS[scheme]
    with torch.device("meta"):
        of_meta = multiply_in_8_bits(nn.Sequential(QuantLinear(INPUTS, OUTPUTS, False, scheme)))
    assert (of_meta.layers, of_meta.error) == (1, 0)


@pytest.mark.parametrize(
    ("scheme", "capability", "said"),
    [
        ("int8", (8, 0), None),
        ("fp8", (8, 9), None),
        ("fp8", (9, 0), None),
        ("int8", (7, 5), "int8 needs compute capability 8.0, and a card has 7.5; leave out --quant_matmul"),
        ("fp8", (8, 6), "fp8 needs compute capability 8.9, and a card has 8.6; --base_quant int8 needs 8.0"),
    ],
)
def test_devices(
    monkeypatch: pytest.MonkeyPatch, scheme: str, capability: tuple[int, int], said: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    eight_bit.check_device(scheme, torch.device("cpu"))
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU .* this is mps"):
        eight_bit.check_device(scheme, torch.device("mps"))
    if said is None:
        eight_bit.check_device(scheme, torch.device("cuda"))
        return
    with pytest.raises(ConfigError, match=said):
        eight_bit.check_device(scheme, torch.device("cuda"))


def test_weights_without_codes_of_8_bits_are_refused() -> None:
    options = QuantOptions(quant_matmul=True)
    with pytest.raises(ConfigError, match="the transformer is not quantised; give --base_quant int8 or fp8"):
        options.check_products(None)
    with pytest.raises(ConfigError, match="the transformer is in nf4"):
        options.check_products("nf4")
    options.check_products("int8")
    QuantOptions().check_products("nf4")
