"""Activations against their plain references, what is kept of them, and their way back in parts."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from library.nn.activations import GELU, IDENTITY, SWIGLU, gelu, plain_swiglu, swiglu
from tests.nn.test_layers import TOKENS, TOLERANCE, assert_agree, draw, kept, ways

__all__ = ["ways"]  # a fixture


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_swiglu(dtype):
    assert_agree(swiglu, plain_swiglu, (draw(TOKENS, 24, dtype=dtype), draw(TOKENS, 24, dtype=dtype, seed=1)))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gelu(dtype):
    assert_agree(gelu, F.gelu, (draw(TOKENS, 24, dtype=dtype),))


def test_gradients_are_derivatives():
    """In fp64, against finite differences."""
    a, b = (draw(TOKENS, 6, dtype=torch.float64, seed=seed) for seed in (0, 1))
    assert gradcheck(swiglu, (a, b))
    assert gradcheck(gelu, (a,))


def test_only_inputs_are_kept():
    x = draw(TOKENS, 16)
    assert kept(lambda: swiglu(x, x * 2)) == 2 * x.numel()
    assert kept(lambda: plain_swiglu(x, x * 2)) > 2 * x.numel()
    assert kept(lambda: gelu(x)) == x.numel()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("activation", "count"), [(SWIGLU, 2), (GELU, 1), (IDENTITY, 1)], ids=["SwiGLU", "GELU", "none"]
)
def test_the_way_back_makes_the_value_again(activation, count, dtype):
    """All of it, bit for bit, with the gradients of autograd, which are in the memory of the one it got."""
    inputs = [draw(TOKENS, 24, dtype=dtype, seed=seed) for seed in range(count)]
    value, grad = activation.value(*inputs), draw(TOKENS, 24, seed=7).detach().to(dtype)
    expected = torch.autograd.grad(value * 1, inputs, grad)
    again = torch.full_like(value, torch.nan)

    def use(part, rows):
        assert again[rows].isnan().all(), "rows came twice"
        again[rows] = part

    with torch.no_grad():
        grads = activation.back(tuple(inputs), grad, use)
    assert torch.equal(again, value)
    assert all(torch.equal(*pair) for pair in zip(grads, expected, strict=True))
    assert any(found.data_ptr() == grad.data_ptr() for found in grads)
