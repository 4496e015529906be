"""The network against diffusers' own, and against itself: batches, checkpointing, precision, saved memory."""

import dataclasses

import pytest
import torch

from library.models.lumina2_format import parameter_shapes
from library.models.nextdit import NextDiT
from library.nn import products
from tests.models.lumina2_pairs import from_theirs, make_inputs, make_pair, make_params

SIZES = {
    "thirds": {},
    "uneven axes, no grouping": {"head_dim": 16, "n_heads": 3, "n_kv_heads": 3, "axes_dims": (8, 4, 4)},
    "one kv head, two refiners": {
        "dim": 40, "head_dim": 10, "n_kv_heads": 1, "axes_dims": (6, 2, 2), "time_dim": 40, "ffn_dim": 96,
        "n_noise_refiners": 2, "n_context_refiners": 2, "n_layers": 3, "in_channels": 16,
    },
}  # fmt: skip
BATCHES = {
    "one": ((5,), (4, 4)),
    "one word": ((1,), (2, 8)),
    "same lengths": ((6, 6), (4, 6)),
    "different lengths": ((9, 1, 4), (6, 4)),
    "almost the longest caption diffusers can": ((299, 17), (4, 4)),
}


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", BATCHES)
def test_output_and_every_gradient_are_those_of_diffusers(size, batch):
    params = make_params(**SIZES[size])
    pair, inputs = make_pair(params), make_inputs(params, *BATCHES[batch])
    ours, theirs = inputs.ours(pair.ours), inputs.theirs(pair.theirs)
    assert relative(ours, theirs) < 1e-5
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(3))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    expected = {name: weight.grad for name, weight in pair.theirs.named_parameters()}
    total = torch.cat([grad.flatten() for grad in expected.values()]).norm()
    for name, weight in pair.ours.named_parameters():
        theirs = from_theirs(expected, name)
        # the second term is for gradients of zero and their rounding: a caption of one word has no choice
        assert (weight.grad - theirs).norm() < 1e-5 * theirs.norm() + 1e-8 * total, name


def test_gradients_of_the_inputs():
    params = make_params()
    pair, inputs = make_pair(params), make_inputs(params, (5, 3), (4, 4))
    grads = []
    for run in (lambda i: i.ours(pair.ours), lambda i: i.theirs(pair.theirs)):
        leaves = dataclasses.replace(
            inputs,
            x_BCHW=inputs.x_BCHW.clone().requires_grad_(),
            captions=[caption.clone().requires_grad_() for caption in inputs.captions],
        )
        grads.append(torch.autograd.grad(run(leaves).square().sum(), [leaves.x_BCHW, *leaves.captions]))
    for ours, theirs in zip(*grads, strict=True):
        assert relative(ours, theirs) < 1e-5


def test_the_epsilon_of_query_and_key_norms_is_the_parameters_own():
    params = make_params(qk_norm_eps=0.3)
    pair, inputs = make_pair(params), make_inputs(params, (5,), (4, 4))
    for block in (*pair.theirs.layers, *pair.theirs.noise_refiner, *pair.theirs.context_refiner):
        block.attn.norm_q.eps = block.attn.norm_k.eps = 0.3
    with torch.no_grad():
        assert relative(inputs.ours(pair.ours), inputs.theirs(pair.theirs)) < 1e-5
        pair.theirs.layers[0].attn.norm_k.eps = 1e-5
        assert relative(inputs.ours(pair.ours), inputs.theirs(pair.theirs)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_is_its_samples_alone(dtype):
    model = make_model(dtype)
    inputs = make_inputs(model.params, (9, 1, 4, 310), (6, 4))
    together = inputs.ours(model)
    for index in range(4):
        alone = model([inputs.x_BCHW[index]], inputs.t_B[index : index + 1], [inputs.captions[index]])[0]
        assert relative(together[index].float(), alone.float()) < (2e-6 if dtype == torch.float32 else 1e-2)


@torch.no_grad()
def test_pictures_of_a_batch_may_differ_in_size():
    model = make_model()
    one, other = (make_inputs(model.params, (4,), size) for size in ((4, 8), (6, 2)))
    both = model(
        [one.x_BCHW[0], other.x_BCHW[0]], torch.cat((one.t_B, other.t_B)), one.captions + other.captions
    )
    assert [tuple(sample.shape) for sample in both] == [(4, 4, 8), (4, 6, 2)]
    for sample, inputs in zip(both, (one, other), strict=True):
        torch.testing.assert_close(sample, inputs.ours(model)[0], rtol=1e-4, atol=1e-5)


def make_model(dtype: torch.dtype = torch.float32, **changes) -> NextDiT:
    model = make_pair(make_params(**changes)).ours.to(dtype)
    model.t_embedder.float()
    return model


def test_checkpointing_changes_no_gradient_and_keeps_less():
    model = make_model(n_layers=4)
    inputs = make_inputs(model.params, (5, 3), (8, 8))
    outcomes, sizes = [], []
    for mode in ("none", "full"):
        model.runner.keep(mode)
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: _noted(k, t), lambda t: t):
            output = inputs.ours(model)
        grads = torch.autograd.grad(output.square().sum(), list(model.parameters()))
        outcomes.append((output.detach(), *grads))
        sizes.append(sum(kept.values()))
    assert all(torch.equal(plain, again) for plain, again in zip(*outcomes, strict=True))
    assert sizes[1] < 0.2 * sizes[0]


def _noted(kept, tensor):
    """Remember a kept tensor by its memory; weights are there anyway."""
    if not isinstance(tensor, torch.nn.Parameter):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return tensor


def test_nothing_is_kept_for_frozen_weights():
    model = make_model().requires_grad_(False)
    inputs = make_inputs(model.params, (5,), (4, 4))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = inputs.ours(model)
    assert not kept and not output.requires_grad


@torch.no_grad()
@pytest.mark.parametrize("fast", [True, False], ids=["bf16 products", "fp32 products"])
def test_bf16_is_close_to_fp32(monkeypatch, fast):
    monkeypatch.setattr(products, "_cpu_is_fast_in", lambda dtype: fast)
    model, exact = make_model(torch.bfloat16), make_model()
    inputs = make_inputs(exact.params, (40, 31), (8, 8))
    ours = inputs.ours(model)
    assert ours.dtype == torch.bfloat16
    assert relative(ours.float(), inputs.ours(exact)) < 0.03


def test_shapes_of_the_format_are_those_of_the_network():
    params = make_params(n_noise_refiners=2, n_layers=3)
    with torch.device("meta"):
        model = NextDiT(params)
    assert {n: tuple(w.shape) for n, w in model.state_dict().items()} == dict(parameter_shapes(params))


def test_a_latent_that_does_not_fit_is_refused():
    model = make_model()
    for shape in ((4, 5, 4), (4, 4, 3), (3, 4, 4)):
        with pytest.raises(ValueError, match="4 channels, and a height and width divisible by 2"):
            model([torch.zeros(shape)], torch.zeros(1), [torch.zeros(2, 20)])


def test_the_attention_kernel_reaches_every_block():
    model = make_model()
    model.use_attention("sdpa")
    kernels = [block.attention.kernel for block in model.modules() if type(block).__name__ == "Block"]
    assert kernels == ["sdpa"] * 4
