"""The pretended GPU finds what it is there to find. Run on it by `test_pretended_gpu.py`."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn

GPU = torch.device("cuda")
OUT_OF_ORDER = "not in order on a GPU"


@pytest.fixture
def side():
    return torch.cuda.Stream()


def test_it_computes_what_the_cpu_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    model(x).square().sum().backward()
    wanted = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model.to(GPU)(x.to(GPU)).square().sum().backward()
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        assert parameter.grad.device.type == "cuda"
        torch.testing.assert_close(parameter.grad.cpu(), grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_formula(dtype):
    q, k, v = (
        torch.randn(2, heads, 7, 16, device=GPU, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)
    )
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    keys, values = (x.float().repeat_interleave(2, 1) for x in (k, v))
    formula = (q.float() @ keys.mT / 4).softmax(-1) @ values
    direction = torch.randn_like(formula)
    found = torch.autograd.grad((out.float() * direction).sum(), (q, k, v))
    wanted = torch.autograd.grad((formula * direction).sum(), (q, k, v))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (out.float() - formula).abs().max() < tolerance
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_rms_norm_is_the_formula_and_keeps_little(dtype, weighted):
    x = torch.randn(2, 5, 64, dtype=dtype, device=GPU, requires_grad=True)
    weight = torch.randn(64, dtype=dtype, device=GPU, requires_grad=True) if weighted else None
    direction = torch.randn_like(x)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = F.rms_norm(x, (64,), weight, 1e-5)
    assert sum(kept.values()) == x.nbytes + 10 * 4 + (weight.nbytes if weighted else 0)
    wide = [y.detach().cpu().double().requires_grad_() for y in (x, weight) if y is not None]
    exact = F.rms_norm(wide[0], (64,), wide[1] if weighted else None, 1e-5)
    found = torch.autograd.grad(out, [y for y in (x, weight) if y is not None], direction)
    wanted = torch.autograd.grad(exact, wide, direction.cpu().double())
    tolerance = 1e-6 if dtype == torch.float32 else 0.01
    for mine, theirs in zip((out, *found), (exact, *wanted), strict=True):
        assert mine.device.type == "cuda" and mine.dtype == dtype
        assert (mine.cpu() - theirs).norm() < tolerance * theirs.norm()


@triton.jit
def _add_one(source, target, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(target + places, tl.load(source + places) + 1)


def test_kernels_of_triton_are_in_order(side):
    x, y = torch.ones(4, device=GPU), torch.zeros(8, device=GPU)
    _add_one[(1,)](x, y[4:], SIZE=4)
    assert y.tolist() == [0] * 4 + [2] * 4
    _add_one[(1,)](x, y, SIZE=4)
    with pytest.raises(RuntimeError, match=f"{OUT_OF_ORDER}: _add_one on stream .* reads what .* writes"):
        with torch.cuda.stream(side):
            _add_one[(1,)](y, x, SIZE=4)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _add_one[(1,)](y, y, SIZE=4)
        _add_one[(1,)](x, y, SIZE=4)  # reads x, which others may do, too
    with pytest.raises(RuntimeError, match=f"{OUT_OF_ORDER}: .* reads what _add_one on stream .* writes"):
        y + 1
    assert (x * 2).tolist() == [2] * 4
    torch.cuda.synchronize()


def test_devices_do_not_mix():
    here, there = torch.ones(3), torch.ones(3, device=GPU)
    with pytest.raises(RuntimeError, match="one device|same device"):
        here + there
    with pytest.raises(RuntimeError, match="one device|same device"):
        torch.mm(torch.ones(3, 3, device=GPU), torch.ones(3, 3))
    assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a number is none of either


def test_views_share_their_memory():
    x = torch.zeros(6, device=GPU)
    x.view(2, 3)[1] += 1
    x[::2].mul_(5)
    assert x.tolist() == [0, 0, 0, 1, 5, 1]


def test_memory_is_counted():
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.empty(1000, device=GPU)
    y = x + 1
    del x
    assert torch.cuda.memory_allocated() - before == 4000
    assert torch.cuda.max_memory_allocated() - before == 8000
    del y
    assert torch.cuda.memory_allocated() == before


def test_a_stream_that_does_not_wait_reads_too_early(side):
    x = torch.ones(3, device=GPU)
    with pytest.raises(RuntimeError, match=f"{OUT_OF_ORDER}: .*mul on stream .* reads what .* writes"):
        with torch.cuda.stream(side):
            x * 2
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
    with pytest.raises(RuntimeError, match=OUT_OF_ORDER):
        y + 1
    torch.cuda.current_stream().wait_event(side.record_event())
    assert (y + 1).tolist() == [3, 3, 3]


def test_a_stream_that_does_not_wait_writes_too_early(side):
    x = torch.ones(3, device=GPU)
    side.wait_stream(torch.cuda.current_stream())
    x * 2
    with pytest.raises(RuntimeError, match=f"{OUT_OF_ORDER}: .* overwrites what .*mul on stream 0 reads"):
        with torch.cuda.stream(side):
            x.zero_()
    torch.cuda.synchronize()


@pytest.mark.parametrize("recorded", [True, False])
def test_memory_is_not_freed_under_another_stream(side, recorded):
    x = torch.ones(3, device=GPU)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x * 2
    if recorded:
        x.record_stream(side)
    del x
    if recorded:
        torch.ones(3, device=GPU)
    else:
        with pytest.raises(RuntimeError, match=f"{OUT_OF_ORDER}: memory of stream 0 .* record_stream"):
            torch.ones(3, device=GPU)


def test_what_comes_back_is_rubbish_until_the_program_waits():
    target = torch.zeros(3, pin_memory=True)
    target.copy_(torch.ones(3, device=GPU), non_blocking=True)
    copied = torch.cuda.current_stream().record_event()
    assert target.isnan().all()
    copied.synchronize()
    assert target.tolist() == [1, 1, 1]


def test_a_source_stays_as_it_is_until_the_program_waits():
    source = torch.ones(3).pin_memory()
    source.to(GPU, non_blocking=True)
    source.zero_()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=f"{OUT_OF_ORDER}: the source of .* changed"):
        torch.ones(3, device=GPU)


@pytest.mark.parametrize(
    ("read", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: torch.tensor([1.0], device=GPU), 1),
        (lambda x: torch.ones(3).to(GPU), 1),
        (lambda x: torch.ones(3).to(GPU, non_blocking=True), 0),
        (lambda x: torch.ones(3).pin_memory().to(GPU, non_blocking=True) + x, 0),
        (lambda x: x.detach().requires_grad_().exp().sum().backward(), 0),
        (lambda x: torch.zeros(3, device=GPU) + x.to(GPU)[1], 0),
    ],
)
def test_the_programs_waits_are_seen(read, waits):
    x = torch.randn(3, device=GPU)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        read(x)
        torch.cuda.set_sync_debug_mode("error")
        if waits:
            with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
                read(x)
        torch.cuda.set_sync_debug_mode("default")
    assert ["synchronizing CUDA operation" in str(warning.message) for warning in seen] == [True] * waits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softmax_in_single_precision_of_half(dtype):
    x = torch.randn(4, 9, dtype=dtype, device=GPU, requires_grad=True)
    y = x.softmax(-1, dtype=torch.float32)
    (y * torch.arange(9, device=GPU)).sum().backward()
    assert y.dtype == torch.float32 and x.grad.dtype == dtype
    torch.testing.assert_close(y, x.float().softmax(-1))


def test_a_generator_of_the_device_is_one():
    draws = [torch.randn(3, device=GPU, generator=torch.Generator(GPU).manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draws)
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
        torch.randn(3, generator=torch.Generator(GPU))
