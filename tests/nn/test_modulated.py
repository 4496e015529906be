"""Modulated norms and gates against their plain references: values, gradients, and what is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from library.nn.activations import gelu
from library.nn.modulated import (
    LayerNorm,
    Modulation,
    gated_residual,
    modulated_layer_norm,
    plain_gated_residual,
    plain_modulated_layer_norm,
)
from library.nn.packing import Packing
from library.nn.running.recompute import Remaking
from library.nn.stand_in import meta_standing_for
from tests.nn.test_layers import LENGTHS, PACKING, TOKENS, assert_agree, draw, kept, ways

__all__ = ["ways"]  # a fixture
EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, len(LENGTHS)], ids=["one row for all", "a row a sample"])
class TestAgreement:
    def test_modulated_layer_norm(self, dtype, rows):
        def call(function):
            return lambda x, gain, shift: function(x, gain, shift, PACKING, EPS)

        inputs = draw(TOKENS, 16, dtype=dtype), draw(rows, 16), draw(rows, 16, seed=1)
        assert_agree(call(modulated_layer_norm), call(plain_modulated_layer_norm), inputs)

    def test_gated_residual(self, dtype, rows):
        def call(function):
            return lambda stream, x, gate: function(stream, x, gate, PACKING)

        inputs = draw(TOKENS, 16, dtype=dtype, seed=1), draw(TOKENS, 16, dtype=dtype), draw(rows, 16)
        assert_agree(call(gated_residual), call(plain_gated_residual), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_samples_of_equal_length(dtype):
    packing = Packing.of((4, 4, 4), torch.device("cpu"))
    x, stream, gain, shift = (
        draw(12, 16, dtype=dtype),
        draw(12, 16, dtype=dtype, seed=1),
        draw(3, 16),
        draw(3, 16, seed=1),
    )
    for fast, plain, inputs, more in (
        (modulated_layer_norm, plain_modulated_layer_norm, (x, gain, shift), (EPS,)),
        (gated_residual, plain_gated_residual, (stream, x, gain), ()),
    ):
        assert_agree(lambda *i: fast(*i, packing, *more), lambda *i: plain(*i, packing, *more), inputs)  # noqa: B023


def test_gradients_are_derivatives():
    """In fp64, against finite differences."""
    x, stream = (draw(TOKENS, 6, dtype=torch.float64, seed=s) for s in (0, 1))
    for rows in (1, len(LENGTHS)):
        gain, shift = (draw(rows, 6, dtype=torch.float64, seed=s) for s in (2, 3))
        assert gradcheck(lambda *i: modulated_layer_norm(*i, PACKING, EPS), (x, gain, shift))
        assert gradcheck(lambda *i: gated_residual(*i, PACKING), (stream, x, gain))


@pytest.mark.parametrize("wanted", range(3))
def test_inputs_that_need_no_gradient_get_none(wanted):
    x, gain, shift = draw(TOKENS, 16), draw(3, 16), draw(3, 16, seed=1)
    inputs = [t if index == wanted else t.detach() for index, t in enumerate((x, gain, shift))]
    modulated_layer_norm(*inputs, PACKING, EPS).square().sum().backward()
    assert inputs[wanted].grad is not None
    stream, branch, gate = draw(TOKENS, 16, seed=2), draw(TOKENS, 16, seed=3), draw(3, 16, seed=4)
    inputs = [t if index == wanted else t.detach() for index, t in enumerate((stream, branch, gate))]
    gated_residual(*inputs, PACKING).square().sum().backward()
    assert inputs[wanted].grad is not None


def test_what_is_kept():
    """The norm keeps its input as it is and two numbers a row; the gate keeps no tokens at all."""
    x, stream = draw(TOKENS, 16, dtype=torch.bfloat16), draw(TOKENS, 16, dtype=torch.bfloat16, seed=1)
    gain, shift = draw(3, 16).detach(), draw(3, 16, seed=1).detach()
    modulation = gain.numel() + shift.numel()
    assert kept(lambda: modulated_layer_norm(x, gain, shift, PACKING, EPS)) == (
        x.numel() + modulation + 2 * TOKENS
    )
    assert kept(lambda: gated_residual(stream, x, gain, PACKING)) == gain.numel()
    gate = gain.clone().requires_grad_()
    assert kept(lambda: gated_residual(stream, x, gate, PACKING)) == gain.numel() + x.numel()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_is_rounded_once(dtype):
    x, stream = draw(64, 32, dtype=dtype).detach(), draw(64, 32, dtype=dtype, seed=1).detach()
    gain, shift = draw(1, 32).detach(), draw(1, 32, seed=1).detach()
    packing = Packing.of((64,), torch.device("cpu"))
    wide = [t.double() for t in (x, gain, shift)]
    exact = plain_modulated_layer_norm(*wide, packing, EPS).float().to(dtype)
    assert (modulated_layer_norm(x, gain, shift, packing, EPS) != exact).float().mean() < 0.005
    twice = F.layer_norm(x, (32,), eps=EPS) * gain.to(dtype) + shift.to(dtype)
    assert (twice != exact).float().mean() > 0.05
    exact = plain_gated_residual(stream.double(), x.double(), gain.double(), packing).float().to(dtype)
    assert (gated_residual(stream, x, gain, packing) != exact).float().mean() < 0.005


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_meta_device(kind, dtype):
    x = torch.empty(TOKENS, 16, dtype=dtype, device="meta", requires_grad=True)
    rows = torch.empty(3, 16, device="meta", requires_grad=True)
    with meta_standing_for(kind):
        for output in (
            modulated_layer_norm(x, rows, rows, PACKING, EPS),
            gated_residual(x, x, rows, PACKING),
        ):
            assert output.shape == x.shape and output.dtype == dtype and output.is_meta
            grads = torch.autograd.grad(output, (x, rows), torch.empty_like(output))
            assert [(g.shape, g.dtype) for g in grads] == [(x.shape, dtype), (rows.shape, rows.dtype)]


def test_results_are_made_again_for_backward():
    """Of a norm after a gate only the gate's inputs are kept, and the gradients are the same."""
    stream, x, gate = draw(TOKENS, 16), draw(TOKENS, 16, seed=1), draw(3, 16)

    def call():
        total = gated_residual(stream, x * 1, gate.detach(), PACKING)
        return gelu(modulated_layer_norm(total, gate, gate, PACKING, EPS)) * stream.detach()

    plain = torch.autograd.grad(call().sum(), (stream, x, gate))
    with Remaking():
        output = call()
    assert all(
        torch.equal(*pair)
        for pair in zip(plain, torch.autograd.grad(output.sum(), (stream, x, gate)), strict=True)
    )


def test_the_affine_layer_norm_is_torchs():
    ours, theirs = LayerNorm(16), torch.nn.LayerNorm(16)
    with torch.no_grad():
        theirs.weight.normal_()
        theirs.bias.normal_()
    ours.load_state_dict(theirs.state_dict())
    x = draw(TOKENS, 16)
    torch.testing.assert_close(ours(x, PACKING), theirs(x))
    half = ours.to(torch.bfloat16)(x.bfloat16(), PACKING)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), theirs(x), rtol=2e-2, atol=4e-2)


def test_modulation_is_computed_in_fp32_whatever_its_weights_are_kept_in():
    layer = Modulation(12, 16, 3)
    time = draw(4, 12)
    exact = F.linear(time, layer.out_layer.weight.bfloat16().float(), layer.out_layer.bias.bfloat16().float())
    parts = layer.to(torch.bfloat16)(time)
    assert [part.shape for part in parts] == [(4, 16)] * 3
    torch.testing.assert_close(torch.cat(parts, dim=1), exact)
    (grad,) = torch.autograd.grad(parts[1].sum(), time)
    torch.testing.assert_close(grad, layer.out_layer.weight[16:32].float().sum(0).expand(4, -1))
