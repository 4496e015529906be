"""The fast layers against their plain references: values, gradients, and what is kept for backward."""

import functools

import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from library.nn import activations, layers, modulated
from library.nn.layers import (
    RMSNorm,
    TimestepEmbedder,
    norm_and_rotate,
    normed_residual,
    official_norm_and_rotate,
    plain_norm_and_rotate,
    plain_normed_residual,
    plain_scaled_rms_norm,
    scaled_rms_norm,
)
from library.nn.packing import Packing, by_sample
from library.nn.running.recompute import run_again_in_backward
from library.nn.stand_in import meta_standing_for

LENGTHS = (5, 1, 7)
TOKENS = sum(LENGTHS)
PACKING = Packing.of(LENGTHS, torch.device("cpu"))
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True, params=["many blocks", "one block", "as on a GPU"])
def ways(request, monkeypatch):
    """The ways to compute: two sizes of the CPU's blocks, and what is done on a GPU."""
    monkeypatch.setattr(layers, "_BLOCK_ELEMENTS", 40 if request.param == "many blocks" else 1 << 18)
    if request.param == "as on a GPU":
        for module in (activations, layers, modulated):
            monkeypatch.setattr(module, "device_kind", lambda x: "cuda")
    return request.param


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def gradients(function, inputs, seed=9):
    """Output of a function and the gradient of a random projection of it, for each input that wants one."""
    output = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    return [
        output.detach(),
        *torch.autograd.grad(output, wanted, draw(*output.shape, seed=seed).to(output.dtype)),
    ]


def assert_agree(fast, plain, inputs):
    dtype = inputs[0].dtype
    for ours, reference in zip(gradients(fast, inputs), gradients(plain, inputs), strict=True):
        assert ours.dtype == reference.dtype and ours.shape == reference.shape
        error = (ours.float() - reference.float()).norm() / reference.float().norm()
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, len(LENGTHS)], ids=["one gain for all", "a gain a sample"])
class TestNorms:
    def test_scaled_rms_norm(self, dtype, rows):
        def call(function):
            return lambda x, gain: function(x, gain, PACKING, 1e-5)

        inputs = draw(TOKENS, 16, dtype=dtype), draw(rows, 16)
        assert_agree(call(scaled_rms_norm), call(plain_scaled_rms_norm), inputs)

    def test_normed_residual(self, dtype, rows):
        def call(function):
            return lambda stream, x, gain: function(stream, x, gain, PACKING, 1e-5)

        inputs = draw(TOKENS, 16, dtype=dtype, seed=1), draw(TOKENS, 16, dtype=dtype), draw(rows, 16)
        assert_agree(call(normed_residual), call(plain_normed_residual), inputs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_norm_and_rotate_reads_a_part_of_a_wider_tensor(dtype):
    table = draw(TOKENS, 4, 2).detach()

    def call(function):
        return lambda qkv, gain: function(qkv[:, :3], gain, table, 1e-6)

    assert_agree(
        call(norm_and_rotate), call(plain_norm_and_rotate), (draw(TOKENS, 5, 8, dtype=dtype), draw(3, 8))
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_norm_without_rotation(dtype):
    def call(function):
        return lambda x, gain: function(x, gain, None, 1e-6)

    inputs = draw(TOKENS, 3, 8, dtype=dtype), draw(3, 8)
    assert_agree(call(norm_and_rotate), call(plain_norm_and_rotate), inputs)
    still = torch.tensor([1.0, 0.0]).expand(TOKENS, 4, 2)
    turned = norm_and_rotate(inputs[0], inputs[1], still, 1e-6)
    assert torch.equal(norm_and_rotate(*inputs, None, 1e-6), turned)


def test_the_official_rounding_is_to_bf16_after_rotation_alone():
    x, gain, table = draw(TOKENS, 3, 8), draw(3, 8), draw(TOKENS, 4, 2).detach()
    exact = plain_norm_and_rotate(x, gain, table, 1e-6)
    rounded = official_norm_and_rotate(x, gain, table, 1e-6)
    assert torch.equal(rounded, exact.bfloat16().float()) and not torch.equal(rounded, exact)
    assert torch.equal(
        official_norm_and_rotate(x, gain, None, 1e-6), plain_norm_and_rotate(x, gain, None, 1e-6)
    )


def test_gradients_are_derivatives():
    """In fp64, against finite differences."""
    x, stream = (draw(TOKENS, 6, dtype=torch.float64, seed=s) for s in (0, 1))
    gain = draw(len(LENGTHS), 6, dtype=torch.float64)
    heads, head_gain = draw(TOKENS, 2, 6, dtype=torch.float64), draw(2, 6, dtype=torch.float64)
    table = draw(TOKENS, 3, 2, dtype=torch.float64).detach()
    assert gradcheck(lambda *i: scaled_rms_norm(*i, PACKING, 1e-5), (x, gain))
    assert gradcheck(lambda *i: normed_residual(*i, PACKING, 1e-5), (stream, x, gain))
    assert gradcheck(lambda *i: norm_and_rotate(*i, table, 1e-6), (heads, head_gain))
    assert gradcheck(lambda *i: norm_and_rotate(*i, None, 1e-6), (heads, head_gain))


def test_inputs_that_need_no_gradient_get_none():
    x, gain = draw(TOKENS, 16), draw(1, 16)
    scaled_rms_norm(x.detach(), gain, PACKING, 1e-5).sum().backward()
    normed_residual(x.detach(), x, gain.detach(), PACKING, 1e-5).sum().backward()
    assert gain.grad is not None and x.grad is not None


def kept(function):
    """Elements that a function keeps for backward."""
    sizes = {}

    def count(tensor):
        sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        function()
    return sum(sizes.values())


def noted(found, tensor):
    found.append(tensor.nbytes)
    return tensor


def test_only_inputs_and_a_number_a_row_are_kept():
    x, gain = draw(TOKENS, 16), draw(1, 16)
    heads, gains, table = draw(TOKENS, 3, 8), draw(3, 8), draw(TOKENS, 4, 2).detach()
    if layers.device_kind(x) == "cpu":  # a GPU's kernel is not there; see the next test
        assert kept(lambda: scaled_rms_norm(x, gain, PACKING, 1e-5)) == x.numel() + gain.numel() + TOKENS
    assert kept(lambda: norm_and_rotate(heads, gains, table, 1e-6)) == (
        heads.numel() + gains.numel() + table.numel() + 3 * TOKENS
    )


@pytest.mark.parametrize("trained", [False, True])
def test_what_norms_keep_on_a_gpu(trained):
    """Of x and the stream only x, and that in its own dtype, whether or not the gain is trained."""
    x, stream = (
        torch.empty(TOKENS, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in "ab"
    )
    gain = torch.empty(1, 16, device="meta", requires_grad=trained)
    with meta_standing_for("cuda"):
        for call, inputs in ((scaled_rms_norm, [x]), (normed_residual, [stream, x])):
            found = []
            with saved_tensors_hooks(functools.partial(noted, found), lambda tensor: tensor):
                y = call(*inputs, gain, PACKING, 1e-5)
            assert sorted(found) == [2 * 16, 4 * TOKENS, 2 * x.numel()]
            wanted = [*inputs, gain] if trained else inputs
            grads = torch.autograd.grad(y, wanted, torch.empty_like(y))
            assert [(g.shape, g.dtype) for g in grads] == [(w.shape, w.dtype) for w in wanted]


def test_run_again_in_backward():
    x, y = draw(4, 5), draw(4, 5, seed=1)

    def function(a, b):
        return (a * b).sin() * a

    assert_agree(lambda a, b: run_again_in_backward(function, a, b), function, (x, y))
    assert_agree(
        lambda a: run_again_in_backward(function, a, y.detach()), lambda a: function(a, y.detach()), (x,)
    )
    assert kept(lambda: run_again_in_backward(function, x, y)) == x.numel() + y.numel()


def test_half_precision_norms_are_computed_in_fp32():
    """The result is the exact one, rounded once; torch's own bf16 norm followed by a product rounds twice. On
    a GPU the gain is rounded beforehand."""
    x, gain = draw(64, 32, dtype=torch.bfloat16).detach(), draw(1, 32).detach()
    packing = Packing.of((64,), torch.device("cpu"))
    exact_gain = gain.double() if layers.device_kind(x) == "cpu" else gain.bfloat16().double()
    exact = plain_scaled_rms_norm(x.double(), exact_gain, packing, 1e-5)
    differing = scaled_rms_norm(x, gain, packing, 1e-5) != exact.float().bfloat16()
    assert differing.float().mean() < 0.005
    assert (plain_scaled_rms_norm(x, gain, packing, 1e-5) != exact.float().bfloat16()).float().mean() > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_heads_are_rounded_once(dtype):
    x, gain, table = draw(64, 3, 32, dtype=dtype).detach(), draw(3, 32).detach(), draw(64, 16, 2).detach()
    for turns in (None, table):
        exact = plain_norm_and_rotate(x.float(), gain, turns, 1e-6).to(dtype)
        assert (norm_and_rotate(x, gain, turns, 1e-6) != exact).float().mean() < 0.005


@pytest.mark.parametrize("lengths", [(13,), (4, 4, 4), (5, 1, 7)], ids=str)
def test_rows_broadcast_over_the_tokens_that_they_are_for(lengths):
    tokens, rows = draw(sum(lengths), 6), draw(len(lengths), 6)
    parts = by_sample(lengths, [rows, 2 * rows], [tokens])
    assert len(parts) == (1 if len(set(lengths)) == 1 else len(lengths))
    ours = torch.cat([(x * row + twice).reshape(-1, 6) for row, twice, x in parts])
    of_each = rows.repeat_interleave(torch.tensor(lengths), dim=0)
    assert torch.equal(ours, tokens * of_each + 2 * of_each)
    assert all(x.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr() for *_, x in parts)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_samples_of_equal_length(dtype):
    packing = Packing.of((4, 4, 4), torch.device("cpu"))

    def call(function):
        return lambda x, gain: function(x, gain, packing, 1e-5)

    inputs = draw(12, 16, dtype=dtype), draw(3, 16)
    assert_agree(call(scaled_rms_norm), call(plain_scaled_rms_norm), inputs)
    alone = [
        plain_scaled_rms_norm(x, row[None], packing, 1e-5)
        for x, row in zip(inputs[0].split(4), inputs[1], strict=True)
    ]
    assert torch.equal(plain_scaled_rms_norm(*inputs, packing, 1e-5), torch.cat(alone))


def test_gain_joins_weight_and_factor_in_fp32():
    norm = RMSNorm(4, 1e-5).to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert norm.gain().dtype == torch.float32 and norm.gain().tolist() == [[1.0, 2.0, 3.0, 4.0]]
    assert norm.gain(torch.tensor([[1.0], [0.5]])).tolist() == [[1.0, 2.0, 3.0, 4.0], [0.5, 1.0, 1.5, 2.0]]


def test_neighbouring_times_differ_even_in_a_bf16_model():
    embedder = TimestepEmbedder(16)
    times = torch.linspace(0, 1, 1001)
    assert len(embedder(times).unique(dim=0)) == 1001
