"""Our Triton kernels against the plain functions, in Triton's interpreter.

`test_triton.py` runs this file in a process of its own: TRITON_INTERPRET must be set before Triton is
imported, and holds for all that imports it.
"""

import pytest
import torch
from triton.runtime import interpreter

from library.models.kandinsky5_dit import Kandinsky5DiT
from library.models.kandinsky5_format import Kandinsky5Params
from library.models.kandinsky5_format import linear_layers as kandinsky5_layers
from library.models.lumina2_format import NextDiTParams
from library.models.lumina2_format import linear_layers as lumina2_layers
from library.models.nextdit import NextDiT
from library.nn import activations, layers, modulated, products
from library.nn.kernels import replace_parts
from library.nn.packing import Packing
from library.nn.running.recompute import Remaking
from library.nn.swap.block_swap import BlockSwap
from library.nn.triton_kernels import check as triton_check
from library.nn.triton_kernels import launch as triton_launch
from library.nn.triton_kernels import layers as triton_layers
from library.nn.triton_kernels import modulated as triton_modulated
from networks.lora import LoRANetwork, LoRASize
from tests.triton_interpreter import mended

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = (18, 1, 4)  # more and fewer than a program takes
TOKENS = sum(LENGTHS)
PACKING = Packing.of(LENGTHS, torch.device("cpu"))
EPS = 1e-5


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    for name, function in mended().items():
        monkeypatch.setattr(interpreter, name, function)


def draw(*shape, dtype=torch.float32, seed=0, wanted=True):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_(wanted)


def gradients(function, inputs, dtype):
    """The output, and the gradients of the inputs that want one; the output's is of this dtype."""
    output = function(*inputs)
    grad = draw(*output.shape, dtype=dtype, seed=9, wanted=False).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, [x for x in inputs if x.requires_grad], grad)]


def assert_agree(fast, exact, inputs, wide=torch.float64):
    """`exact` is computed in fp64 and rounded once, unless the other is `wide`."""
    copies = [x.detach().to(wide or x.dtype).requires_grad_(x.requires_grad) for x in inputs]
    dtype = inputs[0].dtype
    for ours, reference in zip(gradients(fast, inputs, dtype), gradients(exact, copies, dtype), strict=True):
        assert ours.shape == reference.shape
        if ours.dtype == torch.float32:
            assert (ours - reference).norm() < 5e-7 * reference.norm()
        else:
            assert (ours != reference.to(ours.dtype)).float().mean() < 0.005


def parts(width, dtype, rows):
    """Each part with both functions and its inputs."""
    x, stream = (draw(TOKENS, width, dtype=dtype, seed=seed) for seed in (0, 1))
    gain, shift = (draw(rows, width, seed=seed) for seed in (2, 3))
    return {
        "rms norm": (
            lambda x, gain: triton_layers.scaled_rms_norm(x, gain, PACKING, EPS),
            lambda x, gain: layers.plain_scaled_rms_norm(x, gain, PACKING, EPS),
            (x, gain),
        ),
        "normed residual": (
            lambda *i: triton_layers.normed_residual(*i, PACKING, EPS),
            lambda *i: layers.plain_normed_residual(*i, PACKING, EPS),
            (stream, x, gain),
        ),
        "layer norm": (
            lambda *i: triton_modulated.modulated_layer_norm(*i, PACKING, EPS),
            lambda *i: modulated.plain_modulated_layer_norm(*i, PACKING, EPS),
            (x, gain, shift),
        ),
        "gate": (
            lambda *i: triton_modulated.gated_residual(*i, PACKING),
            lambda *i: modulated.plain_gated_residual(*i, PACKING),
            (stream, x, gain),
        ),
    }


@pytest.mark.parametrize(
    ("dtype", "rows", "width"), [(DTYPES[0], 3, 33), (DTYPES[1], 1, 24), (DTYPES[2], 3, 16)]
)
@pytest.mark.parametrize("part", ["rms norm", "normed residual", "layer norm", "gate"])
def test_rows(part, dtype, rows, width):
    """One row of gains for all samples, or a row each."""
    assert_agree(*parts(width, dtype, rows)[part])


@pytest.mark.parametrize("part", ["rms norm", "normed residual", "layer norm", "gate"])
def test_only_what_is_wanted_gets_a_gradient(part):
    fast, exact, inputs = parts(24, torch.float32, 3)[part]
    for wanted in range(len(inputs)):
        chosen = [x.detach().requires_grad_(index == wanted) for index, x in enumerate(inputs)]
        assert_agree(fast, exact, chosen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_way_back_through_swiglu_makes_its_value_again(dtype):
    inputs, values = tuple(draw(50, 30, dtype=dtype, seed=seed) for seed in (0, 1)), []
    value, *expected = gradients(triton_layers.swiglu, inputs, dtype)
    grad = draw(50, 30, dtype=dtype, seed=9, wanted=False)
    with torch.no_grad():
        grads = triton_layers.swiglu_back(inputs, grad, lambda y, rows: values.append(y[rows]))
    assert all(torch.equal(*pair) for pair in zip((*values, *grads), (value, *expected), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_check_at_the_start_finds_nothing(dtype):
    assert triton_check.differing_parts(torch.device("cpu"), dtype) == []


def scaled_back(function, *, only):
    """The same results, of which one has another gradient."""

    def changed(*inputs):
        result = function(*inputs)
        if inputs[only].requires_grad:
            inputs[only].register_hook(lambda grad: grad * 1.1)
        return result

    changed.__name__ = function.__name__
    return changed


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("scaled_rms_norm", lambda function: lambda x, gain, *rest: function(x, gain[:1], *rest)),
        ("normed_residual", lambda function: scaled_back(function, only=2)),
        ("norm_and_rotate", lambda function: lambda x, gain, table, eps: function(x, gain, None, eps)),
        ("swiglu", lambda function: lambda a, b: function(a, b) * float("nan")),
        ("swiglu_back", lambda function: lambda inputs, grad, use: function(inputs[::-1], grad, use)),
    ],
)
def test_the_check_at_the_start_finds_a_wrong_kernel(name, change, monkeypatch):
    function = change(getattr(triton_layers, name))
    function.__name__ = name
    monkeypatch.setattr(triton_layers, name, function)
    assert triton_check.differing_parts(torch.device("cpu"), torch.bfloat16) == [name]


@pytest.mark.parametrize("name", ["modulated_layer_norm", "gated_residual"])
def test_the_check_at_the_start_finds_a_wrong_modulation(name, monkeypatch):
    function = scaled_back(getattr(triton_modulated, name), only=0)
    monkeypatch.setattr(triton_modulated, name, function)
    assert triton_check.differing_parts(torch.device("cpu"), torch.float32) == [name]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(dtype):
    """Rounded in between too, so beside the function written by hand."""
    a, b = (draw(50, 30, dtype=dtype, seed=seed) for seed in (0, 1))
    assert_agree(triton_layers.swiglu, activations.swiglu, (a, b), wide=None)


@pytest.mark.parametrize(("dtype", "width"), list(zip(DTYPES, (24, 10, 32), strict=True)), ids=str)
def test_heads_within_a_wider_tensor(dtype, width):
    """11 heads of 13, more than a program takes; gains of all heads apart and as one that is expanded."""
    qkv, table = draw(21, 13, width, dtype=dtype), draw(21, width // 2, 2, wanted=False)
    for gain in (draw(11, width), draw(width).expand(11, -1)):
        assert_agree(
            lambda x, gain: triton_layers.norm_and_rotate(x[:, :11], gain, table, EPS),
            lambda x, gain: layers.plain_norm_and_rotate(x[:, :11], gain, table.to(x.dtype), EPS),
            (qkv, gain),
        )


def test_heads_that_are_not_turned():
    for wanted in ((True, False), (False, True)):
        inputs = [draw(21, 3, 7, wanted=wanted[0]), draw(3, 7, wanted=wanted[1])]
        assert_agree(
            lambda x, gain: triton_layers.norm_and_rotate(x, gain, None, EPS),
            lambda x, gain: layers.plain_norm_and_rotate(x, gain, None, EPS),
            inputs,
        )


def test_views_and_gradients_that_are_not_contiguous():
    """Columns of wider tensors go in as they are; a gradient may be one number for all."""
    wide, rows = draw(TOKENS, 60), draw(3, 72)
    stream, x = wide[:, :24], wide[:, 30:54]
    gain, shift = rows[:, :24], rows[:, 24:48]
    for fast, plain, inputs in (
        (triton_layers.scaled_rms_norm, layers.plain_scaled_rms_norm, (x, gain, PACKING, EPS)),
        (triton_layers.normed_residual, layers.plain_normed_residual, (stream, x, gain, PACKING, EPS)),
        (
            triton_modulated.modulated_layer_norm,
            modulated.plain_modulated_layer_norm,
            (x, gain, shift, PACKING, EPS),
        ),
        (triton_modulated.gated_residual, modulated.plain_gated_residual, (stream, x, gain, PACKING)),
        (triton_layers.swiglu, activations.plain_swiglu, (stream, x)),
        (triton_layers.swiglu, activations.plain_swiglu, (x.t(), stream.t())),
    ):
        found = torch.autograd.grad(fast(*inputs).sum(), (wide, rows), allow_unused=True)
        expected = torch.autograd.grad(plain(*inputs).sum(), (wide, rows), allow_unused=True)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def every_part(lengths, dtype=torch.float32):
    """Each part with its inputs, for samples of these lengths."""
    packing, tokens = Packing.of(lengths, torch.device("cpu")), sum(lengths)
    x, stream = (draw(tokens, 24, dtype=dtype, seed=seed) for seed in (0, 1))
    gain, shift = (draw(len(lengths), 24, seed=seed) for seed in (2, 3))
    heads, table = draw(tokens, 2, 12, dtype=dtype), draw(tokens, 6, 2, wanted=False)
    return [
        (lambda *i: triton_layers.scaled_rms_norm(*i, packing, EPS), (x, gain)),
        (lambda *i: triton_layers.normed_residual(*i, packing, EPS), (stream, x, gain)),
        (triton_layers.swiglu, (x, stream)),
        (lambda *i: triton_layers.norm_and_rotate(*i, table, EPS), (heads, draw(2, 12))),
        (lambda *i: triton_modulated.modulated_layer_norm(*i, packing, EPS), (x, gain, shift)),
        (lambda *i: triton_modulated.gated_residual(*i, packing), (stream, x, gain)),
    ]


def test_gradients_in_any_layout():
    """Attention returns its gradients transposed, a sum one that is expanded, a slice one with gaps."""
    for function, inputs in every_part((3, 2)):
        output = function(*inputs)
        grad = draw(*output.shape, seed=9, wanted=False)
        gaps = torch.full((len(grad), 3, *grad.shape[1:]), torch.nan)
        gaps[:, 1] = grad
        last = grad.movedim(-1, 0).contiguous().movedim(0, -1)
        other = grad.transpose(0, 1).contiguous().transpose(0, 1)
        row = grad[:1].expand_as(grad)
        for same, laid in ((grad, gaps[:, 1]), (grad, last), (grad, other), (row.contiguous(), row)):
            assert torch.equal(same, laid)
            expected = torch.autograd.grad(output, inputs, same, retain_graph=True)
            found = torch.autograd.grad(output, inputs, laid, retain_graph=True)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("lengths", [(0,), (0, 0), (3, 0, 2), (1,)], ids=str)
def test_samples_of_no_tokens_and_of_one(lengths):
    """A sample without tokens changes nothing, and its gains get zeros for gradients."""
    for function, inputs in every_part(lengths):
        output = function(*inputs)
        grads = torch.autograd.grad(output.sum(), inputs)
        assert output.shape == inputs[0].shape
        for grad, x in zip(grads, inputs, strict=True):
            assert grad.shape == x.shape and grad.isfinite().all()
            if len(x) == len(lengths) != sum(lengths):
                assert [bool(row.any()) for row in grad] == [length > 0 for length in lengths]


def test_without_gradients_nothing_is_kept():
    for function, inputs in every_part((3, 2), torch.bfloat16):
        expected = function(*inputs)
        with torch.no_grad():
            found = function(*inputs)
        assert torch.equal(found, expected) and not found.requires_grad


# ---- whole models ----


@pytest.fixture
def launched(monkeypatch):
    """Replace the parts by kernels; the names of those that are launched."""
    names = []

    def launch(kernel, *rest, **constants):
        names.append(kernel.__name__)
        triton_launch.launch(kernel, *rest, **constants)

    monkeypatch.setattr(triton_layers, "launch", launch)
    monkeypatch.setattr(triton_modulated, "launch", launch)
    yield names
    replace_parts("torch")


def lumina(dtype):
    params = NextDiTParams(
        dim=24, n_layers=1, n_noise_refiners=1, n_context_refiners=1, n_heads=2, n_kv_heads=1, head_dim=12,
        ffn_dim=40, cap_feat_dim=20, time_dim=24, axes_dims=(4, 4, 4), in_channels=4,
    )  # fmt: skip
    latents = [draw(4, 2, 4, wanted=False), draw(4, 2, 2, wanted=False)]
    captions = [draw(length, 20, dtype=dtype, wanted=False) for length in (3, 2)]
    times = torch.tensor([0.3, 0.8])
    return NextDiT(params), lumina2_layers(params), (latents, times, captions)


def kandinsky(dtype):
    params = Kandinsky5Params(
        model_dim=24, ff_dim=48, n_text_blocks=1, n_visual_blocks=1, head_dim=12, text_dim=20, pooled_dim=8,
        time_dim=16, axes_dims=(4, 4, 4),
    )  # fmt: skip
    latents = [draw(params.in_channels, *size, wanted=False) for size in ((2, 4), (2, 2))]
    texts = [draw(length, 20, dtype=dtype, wanted=False) for length in (3, 2)]
    pooled = draw(2, 8, dtype=dtype, wanted=False)
    times = torch.tensor([300.0, 800.0])
    return Kandinsky5DiT(params), kandinsky5_layers(params), (latents, times, texts, pooled)


KERNELS = {
    lumina: {f"_{part}_{way}ward" for part in ("rms", "rotate", "swiglu") for way in ("for", "back")},
    kandinsky: {f"_{part}_{way}ward" for part in ("layer", "gate", "rotate") for way in ("for", "back")},
}


def randomised(make, dtype):
    """Nothing is zero. Time is embedded in fp32."""
    torch.manual_seed(0)
    model, paths, inputs = make(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=weight.shape[1] ** -0.5) if weight.dim() == 2 else weight.normal_(1.0, 0.2)
    model.to(dtype)
    for name, child in model.named_children():
        if name in ("t_embedder", "time_embeddings"):
            child.float()
    return model, paths, inputs


def train(model, trained, inputs):
    """The outputs, and the gradients of a step to what is trained."""
    trained.zero_grad()
    outputs = model(*inputs)
    sum(output.float().square().sum() for output in outputs).backward()
    return [*(output.detach() for output in outputs), *(p.grad for p in trained.parameters())]


@pytest.mark.parametrize(
    ("make", "dtype", "allowed", "modes"),
    [
        (lumina, torch.float32, 2e-4, ("selective", "feed_forward", "full")),
        (kandinsky, torch.float32, 2e-4, ()),
        (kandinsky, torch.bfloat16, 5e-2, ("full",)),
    ],
)
def test_a_step_of_a_model(monkeypatch, launched, make, dtype, allowed, modes):
    """As without kernels, and bit for bit the same whatever is kept for backward, and with block swap.

    Modulation learns too.
    """
    monkeypatch.setattr(products, "_cpu_is_fast_in", lambda _: False)
    model, paths, inputs = randomised(make, dtype)
    model.requires_grad_(False)
    ring = BlockSwap(model.runner.blocks, torch.device("cpu"), ring_size=1)
    network = LoRANetwork(model, {path: LoRASize(2, 2) for path in paths})
    network.apply_to(model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    plain = train(model, network.train(), inputs)
    assert not launched
    replace_parts("triton")
    fused = train(model, network, inputs)
    assert set(launched) == KERNELS[make]
    assert max(((a - b).norm() / b.norm()).item() for a, b in zip(fused, plain, strict=True)) < allowed
    for mode in modes:
        model.runner.keep(mode)
        again = train(model, network, inputs)
        assert all(torch.equal(a, b) for a, b in zip(again, fused, strict=True)), mode
    model.runner.ring = ring
    swapped = train(model, network, inputs)
    assert all(torch.equal(a, b) for a, b in zip(swapped, fused, strict=True))


@pytest.mark.parametrize("make", [lumina, kandinsky])
def test_a_step_of_all_weights(launched, make):
    """Gains of norms, biases and embedders included."""
    model, _, inputs = randomised(make, torch.float32)
    plain = train(model, model, inputs)
    replace_parts("triton")
    fused = train(model, model, inputs)
    assert set(launched) == KERNELS[make]
    assert all((a - b).norm() < 2e-4 * b.norm() + 1e-4 for a, b in zip(fused, plain, strict=True))
    model.runner.keep("outputs")
    assert all(torch.equal(*pair) for pair in zip(train(model, model, inputs), fused, strict=True))


def test_results_are_made_again_for_backward(launched):
    replace_parts("triton")
    stream, x, gate = draw(TOKENS, 24), draw(TOKENS, 24, seed=1), draw(3, 24)

    def call():
        total = modulated.gated_residual(stream, x * 1, gate.detach(), PACKING)
        return activations.swiglu(layers.scaled_rms_norm(total, gate, PACKING, EPS), stream)

    plain = torch.autograd.grad(call().sum(), (stream, x, gate))
    with Remaking():
        output = call()
    made_again = torch.autograd.grad(output.sum(), (stream, x, gate))
    assert all(torch.equal(*pair) for pair in zip(plain, made_again, strict=True))
    forward = ["_gate_forward", "_rms_forward", "_swiglu_forward"]
    assert sorted(name for name in launched if name.endswith("forward")) == sorted(
        3 * forward[:2] + 2 * forward[2:]
    )
