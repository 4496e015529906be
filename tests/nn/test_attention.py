"""Attention over packed samples."""

import importlib.util

import pytest
import torch

from library.core.errors import ConfigError, MissingPackageError
from library.nn import products
from library.nn.attention import Packing, attention, check_kernel, plain_attention

LENGTHS = (7, 1, 12)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def qkv(heads, kv_heads, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(sum(LENGTHS), count, 8, generator=generator).to(dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (4, 1)])
def test_sdpa_is_the_formula(heads, kv_heads):
    packing = Packing.of(LENGTHS, CPU)
    inputs = qkv(heads, kv_heads)
    ours = attention(*inputs, packing)
    reference = plain_attention(*inputs, packing).flatten(1)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, reference)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, weights),
        torch.autograd.grad(reference, inputs, weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_samples_do_not_see_each_other():
    q, k, v = (x.detach() for x in qkv(4, 2))
    together = attention(q, k, v, Packing.of(LENGTHS, CPU))
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        alone = attention(q[rows], k[rows], v[rows], Packing.of((length,), CPU))
        assert torch.equal(together[rows], alone)
        start += length


@pytest.mark.parametrize("fast", [True, False], ids=["bf16 products", "fp32 products"])
def test_bf16(monkeypatch, fast):
    monkeypatch.setattr(products, "_cpu_is_fast_in", lambda dtype: fast)
    inputs = qkv(4, 2, torch.bfloat16)
    packing = Packing.of(LENGTHS, CPU)
    ours = attention(*inputs, packing)
    reference = plain_attention(*(x.float() for x in inputs), packing).flatten(1)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), reference, rtol=2e-2, atol=2e-2)


def test_kernels_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="no attention kernel 'xformers'; choose one of auto, sdpa"):
        check_kernel("xformers", CPU, torch.float32)
    with pytest.raises(ConfigError, match="'varlen' needs a CUDA device .* not cpu"):
        check_kernel("varlen", CPU, torch.bfloat16)
    with pytest.raises(ConfigError, match="not cuda and torch.float32; use 'sdpa'"):
        check_kernel("varlen", CUDA, torch.float32)
    for kernel in ("auto", "sdpa"):
        check_kernel(kernel, CPU, torch.float32)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_without_the_package():
    with pytest.raises(MissingPackageError, match="pip install flash-attn"):
        check_kernel("flash", CUDA, torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_varlen_is_the_formula():
    packing = Packing.of(LENGTHS, CUDA)
    inputs = [x.detach().to(CUDA, torch.bfloat16).requires_grad_() for x in qkv(4, 2)]
    weights = torch.randn(sum(LENGTHS), 32, device=CUDA)
    ours = attention(*inputs, packing, "varlen")
    reference = plain_attention(*(x.float() for x in inputs), packing).flatten(1)
    torch.testing.assert_close(ours.float(), reference, rtol=3e-2, atol=3e-2)
    grads = torch.autograd.grad(ours, inputs, weights.bfloat16())
    for one, other in zip(grads, torch.autograd.grad(reference, inputs, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)
