"""Tokens that skip blocks (TREAD): against a loop that does it picture by picture, in both families."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from library.models.kandinsky5_dit import Kandinsky5DiT
from library.models.nextdit import NextDiT
from library.nn.packing import Layout
from library.nn.running.compiling import part_compiler
from library.nn.running.routing import Routing, choose_kept, kept_count
from library.nn.running.runner import MODES
from library.options.compute import ComputeOptions
from library.options.tread import Route
from networks.lora import LoRANetwork, LoRASize
from tests.models import kandinsky5_pairs, lumina2_pairs

GRIDS = ((8, 6), (2, 4), (6, 10))  # latent height and width; a token is 2 x 2
TEXTS = (5, 9, 1)
ROUTES = (Route(1, 2, 0.5), Route(4, 4, 0.3))


@dataclass(frozen=True)
class Case:
    """A model and a batch of pictures that differ in size, with texts that do."""

    model: NextDiT | Kandinsky5DiT
    x: list[torch.Tensor]
    time_B: torch.Tensor
    texts: list[torch.Tensor]
    pooled_BP: torch.Tensor | None

    def __call__(self, routing=None, pictures=slice(None)):
        more = () if self.pooled_BP is None else (self.pooled_BP[pictures],)
        return self.model(self.x[pictures], self.time_B[pictures], self.texts[pictures], *more, routing)

    @property
    def leaves(self):
        return [*self.model.parameters(), *self.x, *self.texts]


def lumina(dtype=torch.float32, blocks=6):
    params = lumina2_pairs.make_params(n_layers=blocks)
    torch.manual_seed(1)
    model = NextDiT(params)
    return _case(model, params.in_channels, params.cap_feat_dim, dtype, None)


def kandinsky(dtype=torch.float32, blocks=6):
    params = kandinsky5_pairs.make_params(n_text_blocks=1, n_visual_blocks=blocks)
    torch.manual_seed(1)
    model = Kandinsky5DiT(params)
    return _case(model, params.in_channels, params.text_dim, dtype, torch.randn(3, params.pooled_dim))


def _case(model, channels, width, dtype, pooled):
    kandinsky5_pairs.randomise(model)
    model.to(dtype)
    (model.t_embedder if pooled is None else model.time_embeddings).float()
    x = [torch.randn(channels, *grid).to(dtype).requires_grad_() for grid in GRIDS]
    texts = [torch.randn(length, width).to(dtype).requires_grad_() for length in TEXTS]
    times = torch.tensor([0.2, 0.5, 0.9]) * (1 if pooled is None else 1000)
    return Case(model, x, times, texts, None if pooled is None else pooled.to(dtype))


FAMILIES = {"lumina": lumina, "kandinsky5": kandinsky}
both = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)


def tokens(x_Chw):
    return x_Chw.shape[1] * x_Chw.shape[2] // 4


def draw(case, routes=ROUTES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Routing(
        routes,
        tuple(tuple(choose_kept(tokens(x), route.share, generator) for x in case.x) for route in routes),
    )


def of_picture(routing, number):
    return Routing(routing.routes, tuple((kept[number],) for kept in routing.kept))


class Slow(nn.Module):
    """Stands in the place of a model's block, and does the routing itself, for one picture at a time.

    Token by token: those that are not kept are taken off a list, and put back from a dictionary.
    """

    def __init__(self, block, number, memory):
        super().__init__()
        self.block, self.number, self.memory = block, number, memory

    def forward(self, x_TD, layout, *others):
        routing, head = self.memory["routing"], self.memory["head"]
        for route, (kept,) in zip(routing.routes, routing.kept, strict=True):
            staying = [*range(head), *(head + int(n) for n in kept)]
            if self.number == route.first:
                self.memory["rows"] = list(x_TD.unbind())
                x_TD = torch.stack([x_TD[n] for n in staying])
            if route.first <= self.number <= route.last:
                rope = torch.stack([self.memory["rope"][n] for n in staying])
                layout = Layout.of([len(staying)], [rope], x_TD.device)
                if self.number < route.last:
                    return self.block(x_TD, layout, *others)
                made = dict(zip(staying, self.block(x_TD, layout, *others).unbind(), strict=True))
                return torch.stack([made.get(n, row) for n, row in enumerate(self.memory["rows"])])
        self.memory["rope"] = layout.rope_TP2
        return self.block(x_TD, layout, *others)


def slowly(case, routing):
    """What each picture alone gives with `Slow` in the place of the blocks."""
    blocks = case.model.routed_blocks
    originals, memory = list(blocks), {}
    for number, block in enumerate(originals):
        blocks[number] = Slow(block, number, memory)
        case.model.runner._modes[blocks[number]] = "none"
    outputs = []
    for number, text in enumerate(case.texts):
        memory["routing"] = of_picture(routing, number)
        memory["head"] = len(text) if case.pooled_BP is None else 0
        memory["rope"] = None
        outputs += case(None, slice(number, number + 1))
    for number, block in enumerate(originals):
        blocks[number] = block
    return outputs


def gradients(case, outputs):
    loss = sum((out.float() * torch.linspace(-1, 2, out.numel()).view_as(out)).sum() for out in outputs)
    grads = torch.autograd.grad(loss, case.leaves, allow_unused=True)
    return [grad for grad in grads if grad is not None]


def close(found, expected, tolerance=2e-5):
    for ours, theirs in zip(found, expected, strict=True):
        # biases of keys have no gradient but rounding
        assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-4


@both
def test_forward_and_gradients_are_those_of_a_slow_loop(make):
    case = make()
    routing = draw(case)
    fast, slow = case(routing), slowly(case, routing)
    close(fast, slow)
    close(gradients(case, fast), gradients(case, slow))
    plain = case()
    assert all((a - b).norm() > 1e-2 * b.norm() for a, b in zip(fast, plain, strict=True))


@both
@torch.no_grad()
def test_a_batch_is_its_pictures_alone(make):
    case = make()
    routing = draw(case)
    together = case(routing)
    for number, expected in enumerate(together):
        (alone,) = case(of_picture(routing, number), slice(number, number + 1))
        torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-4)


@both
@torch.no_grad()
def test_keeping_every_token_is_no_routing_bit_for_bit(make):
    case = make()
    every = tuple(tuple(torch.arange(tokens(x)) for x in case.x) for _ in ROUTES)
    assert all(map(torch.equal, case(Routing(ROUTES, every)), case()))


@both
@torch.no_grad()
def test_dropped_tokens_are_at_the_end_what_they_were_at_the_start(make):
    case = make()
    (route,) = routes = (Route(2, 3, 0.5),)
    routing, seen = draw(case, routes), {}
    for number, block in enumerate(case.model.routed_blocks):
        block.register_forward_pre_hook(lambda _, given, n=number: seen.__setitem__(n, given[0]))
    text_first = case.pooled_BP is None
    case(routing)
    routed = {n: each.clone() for n, each in seen.items()}
    case()  # block 2 is given the same as without
    before, after = seen[route.first], routed[route.last + 1]
    begin = 0
    for x, text, kept in zip(case.x, case.texts, routing.kept[0], strict=True):
        head = len(text) if text_first else 0
        stays = torch.zeros(head + tokens(x), dtype=torch.bool)
        stays[:head] = stays[head + kept] = True
        rows = slice(begin, begin + len(stays))
        assert torch.equal(after[rows][~stays], before[rows][~stays])
        assert not (after[rows][stays] == before[rows][stays]).all(1).any()
        begin += len(stays)
    assert len(routed[route.first]) == len(routed[route.last]) < len(before) == begin


@both
def test_every_way_of_running_the_blocks_gives_the_same_bits(make):
    case = make(torch.bfloat16)
    routing, expected = draw(case), None
    for mode, every in [*((mode, 1) for mode in MODES), ("full", 2)]:
        case.model.runner.keep(mode, every=every)
        outputs = case(routing)
        found = [*outputs, *gradients(case, outputs)]
        expected = found if expected is None else expected
        assert all(map(torch.equal, found, expected)), mode


@both
def test_flops_are_those_that_torch_counts(make):
    """But for the products of the timestep, which are a row each."""
    case = make()
    blocks = set(case.model.runner.blocks)
    names = {
        f"{type(case.model).__name__}.{n}" for n, module in case.model.named_modules() if module in blocks
    }
    of_time = [
        layer
        for block in blocks
        for name, layer in block.named_modules()
        if "odulation" in name and isinstance(layer, nn.Linear)
    ]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        case(None, slice(0, 1))
    counted = sum(sum(found.values()) for name, found in counter.get_flop_counts().items() if name in names)
    foretold = case.model.block_flops([tokens(case.x[0])] * 6, tokens(case.x[0]), len(case.texts[0]))
    assert foretold + sum(2 * layer.weight.numel() for layer in of_time) == counted


def test_compiled_parts_make_few_graphs_whatever_is_dropped(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    limit = torch._dynamo.config.recompile_limit
    for make in FAMILIES.values():
        torch._dynamo.reset()
        counters.clear()
        case = make()
        case.model.requires_grad_(False)
        paths = [
            n for n, m in case.model.named_modules() if n.endswith(("to_query", "qkv")) and m is not None
        ]
        network = LoRANetwork(case.model, {path: LoRASize(2, 2) for path in paths})
        network.apply_to(case.model)
        case.model.runner.compile(part_compiler(ComputeOptions(torch_compile=True, dynamo_backend="eager")))
        sum(out.float().sum() for out in case()).backward()
        plain = counters["stats"]["unique_graphs"]
        for seed, share in enumerate((0.5, 0.25, 0.4, 0.6)):
            routes = (Route(1, 2, share), Route(4, 5, share / 2))
            sum(out.float().sum() for out in case(draw(case, routes, seed))).backward()
        assert counters["stats"]["unique_graphs"] == plain and not counters["graph_break"]
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


@pytest.mark.parametrize(("count", "share"), [(1, 0.5), (7, 0.25), (100, 0.99), (4096, 0.5), (3, 0.9)])
def test_what_is_kept(count, share):
    kept = choose_kept(count, share, torch.Generator().manual_seed(3))
    assert len(kept) == kept_count(count, share) == max(1, count - round(count * share))
    assert (kept.diff() > 0).all() and 0 <= kept.min() and kept.max() < count


def test_every_token_is_kept_as_often_as_any_other():
    draws = torch.Generator().manual_seed(0)
    counts = torch.zeros(12)
    for _ in range(3000):
        counts[choose_kept(12, 0.5, draws)] += 1
    assert (counts / 3000 - 0.5).abs().max() < 0.04


def test_preferred_tokens_are_kept_first():
    preferred = torch.zeros(20, dtype=torch.bool)
    preferred[3:9] = True
    generator = torch.Generator().manual_seed(0)
    rest = set()
    for _ in range(50):
        kept = choose_kept(20, 0.5, generator, preferred).tolist()
        assert {3, 4, 5, 6, 7, 8} <= set(kept) and len(kept) == 10
        rest |= set(kept)
    assert rest == set(range(20))  # the others are drawn
    kept = choose_kept(20, 0.9, generator, preferred).tolist()
    assert len(kept) == 2 and set(kept) <= set(range(3, 9))
