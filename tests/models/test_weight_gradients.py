"""The model's own weights are trained: each gets the right gradient, in every way of running the blocks."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.models.kandinsky5_dit import Kandinsky5DiT
from library.models.nextdit import NextDiT
from library.nn import products
from library.nn.running.compiling import part_compiler
from library.nn.running.runner import MODES
from library.nn.stand_in import meta_standing_for
from library.options.compute import ComputeOptions
from library.options.tread import Route
from tests.models import kandinsky5_pairs, lumina2_pairs
from tests.models.test_routing import FAMILIES, draw

ROUTES = (Route(1, 1, 0.5),)
WAYS = [*((mode, 1, "none") for mode in MODES), ("full", 2, "none"), ("outputs", 2, "selective")]
PRECISIONS = {"fp32": (torch.float32, True), "bf16 multiplied in fp32": (torch.bfloat16, False)}
both = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)


def small(make, dtype=torch.float32, blocks=3):
    """A case in which nothing but weights wants a gradient."""
    case = make(dtype, blocks)
    for tensor in (*case.x, *case.texts):
        tensor.requires_grad_(False)
    return case


def loss_of(outputs):
    return sum((out.float() * torch.linspace(-1, 2, out.numel()).view_as(out)).sum() for out in outputs)


def gradients(case, routing=None):
    """What a step leaves, by name."""
    case.model.zero_grad()
    loss_of(case(routing)).backward()
    return {name: weight.grad for name, weight in case.model.named_parameters()}


def gradients_of_weights_that_change(case, routing=None):
    """The same, where each weight is lost as soon as it has its gradient, as one that is stepped then is."""
    case.model.zero_grad()
    weights, found = dict(case.model.named_parameters()), {}
    before = {name: weight.detach().clone() for name, weight in weights.items()}

    def lose(name, weight):
        found[name], weight.grad = weight.grad, None
        weight.data.fill_(torch.nan)

    hooks = [
        weight.register_post_accumulate_grad_hook(lambda w, name=name: lose(name, w))
        for name, weight in weights.items()
    ]
    loss_of(case(routing)).backward()
    for hook in hooks:
        hook.remove()
    for name, weight in weights.items():
        weight.data.copy_(before[name])
    return found


def differing(found, expected):
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def errors(found, expected):
    """How far off each gradient is, and all of them together; what is nearly zero is measured by the rest."""
    total = torch.cat([grad.flatten() for grad in expected.values()]).norm()
    off = {name: (found[name].float() - grad).norm() for name, grad in expected.items()}
    together = torch.stack(list(off.values())).norm() / total
    each = {name: (off[name] / (expected[name].norm() + 1e-6 * total)).item() for name in off}
    return each, together.item()


# ---- against others ----


def test_lumina_packed_against_diffusers_one_by_one():
    """Pictures of a batch have their own sizes and captions. What Kandinsky has: test_kandinsky5_dit.py."""
    pair = lumina2_pairs.make_pair(lumina2_pairs.make_params())
    alone = [
        lumina2_pairs.make_inputs(pair.ours.params, (length,), size)
        for length, size in ((9, (4, 8)), (3, (6, 2)))
    ]
    x, captions = [each.x_BCHW[0] for each in alone], [each.captions[0] for each in alone]
    loss_of(pair.ours(x, torch.cat([each.t_B for each in alone]), captions)).backward()
    sum(loss_of([each.theirs(pair.theirs)]) for each in alone).backward()
    theirs = {name: weight.grad for name, weight in pair.theirs.named_parameters()}
    expected = {name: lumina2_pairs.from_theirs(theirs, name) for name, _ in pair.ours.named_parameters()}
    each, together = errors({n: w.grad for n, w in pair.ours.named_parameters()}, expected)
    assert max(each.values()) < 2e-5 and together < 2e-6


@both
def test_no_weight_is_without_a_gradient(make):
    """So there is none that an optimizer or an exchange between processes would have to leave out."""
    for routing in (None, ROUTES):
        case = small(make)
        found = gradients(case, routing and draw(case, routing))
        assert all(grad.abs().sum() > 0 for grad in found.values())


@both
@pytest.mark.parametrize("fast", [True, False], ids=["bf16 products", "fp32 products"])
def test_bf16_against_fp32(monkeypatch, make, fast):
    """1 % off, and no weight 5 %, but for biases of keys: softmax does not see them but through the norm, so
    their gradients are small sums of large numbers."""
    monkeypatch.setattr(products, "_cpu_is_fast_in", lambda _: fast)
    case, exact = small(make, torch.bfloat16), small(make)
    with torch.no_grad():
        for weight in exact.model.parameters():
            weight.copy_(weight.bfloat16())
    found = gradients(case)
    assert {grad.dtype for grad in found.values()} == {torch.bfloat16, torch.float32}
    each, together = errors(found, gradients(exact))
    assert together < 0.015
    for name, error in each.items():
        assert error < (0.1 if name.endswith("to_key.bias") else 0.05), name


# ---- in every way ----


@both
@pytest.mark.parametrize(("dtype", "fast"), PRECISIONS.values(), ids=PRECISIONS)
def test_every_way_of_running_the_blocks_gives_the_same_bits(monkeypatch, make, dtype, fast):
    """With tokens that skip blocks; and nothing reads a weight again that has its gradient.

    In plain bf16, and with weights that stay as they are: test_routing.py.
    """
    monkeypatch.setattr(products, "_cpu_is_fast_in", lambda _: fast)
    case = small(make, dtype)
    routing = draw(case, ROUTES)
    expected = gradients(case, routing)
    for mode, every, between in WAYS:
        case.model.runner.keep(mode, every=every, between=between)
        assert not differing(gradients_of_weights_that_change(case, routing), expected), (mode, every)


@both
def test_kernels_of_attention(make):
    case = small(make)
    expected = gradients(case)
    for kernel in ("torch", "sdpa"):
        case.model.use_attention(kernel)
        assert not differing(gradients(case), expected)
    with sdpa_kernel(SDPBackend.MATH):
        each, _ = errors(gradients(case), expected)
    assert max(each.values()) < 1e-4


TRAINED = {
    "norms": lambda name: "norm" in name,
    "biases": lambda name: name.endswith("bias"),
    "one block": lambda name: "layers.1." in name or "visual_transformer_blocks.1." in name,
    "texts and the last layer": lambda name: any(
        p in name for p in ("context", "cap_", "text", "final", "out")
    ),
}


@both
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_some_weights_are_frozen(make, trained):
    case = small(make)
    expected = {name: grad for name, grad in gradients(case).items() if trained(name)}
    assert expected
    for name, weight in case.model.named_parameters():
        weight.requires_grad_(name in expected)
    for mode, every, between in (("outputs", 1, "none"), ("full", 2, "selective"), ("offload", 2, "none")):
        case.model.runner.keep(mode, every=every, between=between)
        found = gradients(case)
        assert {name for name, grad in found.items() if grad is not None} == set(expected)
        assert not differing(found, expected), (mode, every)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No graphs of other tests, and torch's settings as they were."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


@both
@pytest.mark.usefixtures("fresh")
def test_compiled_blocks(make):
    case = small(make, blocks=1)
    expected = gradients(case)
    options = ComputeOptions(torch_compile=True, dynamo_backend="aot_eager")
    case.model.runner.compile(part_compiler(options))
    for mode in ("none", "full"):
        case.model.runner.keep(mode)
        found = gradients_of_weights_that_change(case)
        each, together = errors(found, expected)
        assert max(each.values()) < 1e-4 and together < 1e-5
    assert not counters["graph_break"]


# ---- what is kept for backward ----


def on_meta(make, blocks):
    """A model in bf16 whose last blocks take nearly all, and a batch of two pictures."""
    x, times = [torch.empty(16, 32, 32), torch.empty(16, 32, 16)], torch.empty(2)
    if make is FAMILIES["lumina"]:
        params = lumina2_pairs.make_params(
            dim=96, n_kv_heads=2, head_dim=24, axes_dims=(8, 8, 8), ffn_dim=384, time_dim=96,
            in_channels=16, n_layers=blocks, n_noise_refiners=0, n_context_refiners=0,
        )  # fmt: skip
        model, texts = NextDiT(params).bfloat16(), [torch.empty(1, 20).bfloat16()] * 2
        model.t_embedder.float()
        return model, (x, times, texts), 386 * 96
    params = kandinsky5_pairs.make_params(model_dim=96, ff_dim=384, n_text_blocks=0, n_visual_blocks=blocks)
    model, texts = Kandinsky5DiT(params).bfloat16(), [torch.empty(1, 20).bfloat16()] * 2
    model.time_embeddings.float()
    return model, (x, times, texts, torch.empty(2, 24).bfloat16()), 384 * 96


def kept_of_a_block(make, mode, kind):
    """Widths of the stream, in bf16, of all large tensors that a block keeps for backward."""
    kept = []
    for blocks in (2, 4):
        with torch.device("meta"):
            model, inputs, width = on_meta(make, blocks)
        model.runner.keep(mode)
        weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
        alive = {}

        def count(tensor, weights=weights, alive=alive):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                alive[storage._cdata] = storage
            return tensor

        with meta_standing_for(kind), saved_tensors_hooks(count, lambda tensor: tensor):
            outputs = model(*inputs)
        sizes = [storage.nbytes() / (2 * width) for storage in alive.values()]
        kept.append(sum(size for size in sizes if size > 0.25))
        del outputs
    return (kept[1] - kept[0]) / 2


KEPT = {
    "lumina": {
        "none": 7 + 2 + 1.5 + 12,
        "selective": 4 + 2 + 8,
        "feed_forward": 4 + 2,
        "outputs": 3,
        "full": 1,
    },
    "kandinsky5": {"none": 18 + 8, "selective": 10 + 4, "feed_forward": 10, "outputs": 3, "full": 1},
}
COPIES = {"lumina": 1, "kandinsky5": 2}  # on a CPU: results of attention, of several pictures, put together


@pytest.mark.parametrize("mode", KEPT["lumina"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_kept_twice_or_in_fp32(monkeypatch, family, mode):
    """Lumina's block: its input, the norm before attention, attention's result, its projection, the stream,
    its norm, the last product; qkv of 2 widths; queries and keys of 1.5; 3 of 4 within the feed-forward.

    Kandinsky's: inputs of 3 norms and their results; 3 queries and keys before and after their norm; values;
    2 results of attention; 3 products that gates multiply; 4 before GELU and 4 after it.
    """
    monkeypatch.setattr(products, "_cpu_is_fast_in", lambda _: True)
    expected = KEPT[family][mode]
    assert kept_of_a_block(FAMILIES[family], mode, "cuda") == pytest.approx(expected, abs=0.01)
    expected += COPIES[family] if mode == "none" else 0
    assert kept_of_a_block(FAMILIES[family], mode, "cpu") == pytest.approx(expected, abs=0.01)


@both
def test_attention_in_fp32_keeps_its_result_once(monkeypatch, make):
    """On a CPU that is slow in bf16 its kernel keeps 2 widths; what follows it keeps no copy in bf16."""
    monkeypatch.setattr(products, "_cpu_is_fast_in", lambda _: False)
    assert kept_of_a_block(make, "outputs", "cpu") == pytest.approx(2 + 2, abs=0.01)
