"""Attention over packed samples."""

import sys
import types

import pytest
import torch

from library.core.errors import ConfigError, MissingPackageError
from library.nn import products
from library.nn.attention import attention, check_kernel, plain_attention
from library.nn.packing import Packing

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
    with pytest.raises(ConfigError, match="no attention kernel 'paged'; choose one of auto, torch, sdpa"):
        check_kernel("paged", CPU, torch.float32)
    with pytest.raises(ConfigError, match="'varlen' needs a CUDA device, not cpu; use 'torch'"):
        check_kernel("varlen", CPU, torch.bfloat16)
    with pytest.raises(ConfigError, match="'varlen' needs bf16 or fp16, not torch.float32; use 'torch'"):
        check_kernel("varlen", CUDA, torch.float32)
    for kernel in ("auto", "torch", "sdpa"):
        check_kernel(kernel, CPU, torch.float32)


@pytest.mark.parametrize(
    ("kernel", "module", "install"),
    [
        ("flash", "flash_attn", "flash-attn --no-build-isolation"),
        ("xformers", "xformers", "xformers"),
        ("sage", "sageattention", "sageattention --no-build-isolation"),
    ],
)
def test_a_kernel_without_its_package(monkeypatch, kernel, module, install):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=f"'{kernel}' needs .* `pip install {install}`"):
        check_kernel(kernel, CUDA, torch.bfloat16)


@pytest.mark.parametrize("kernel", ["flash", "xformers", "sage"])
def test_packages_are_called_as_they_want_to_be(monkeypatch, kernel):
    """With stand-ins that take what the packages take (flash-attn 2.8, xformers 0.0.3x, sageattention 2)."""
    called = []

    def one_sample(q_1THD, k_1TKD, v_1TKD, **more):
        called.append(more)
        q, k, v = (x.transpose(1, 2) for x in (q_1THD, k_1TKD, v_1TKD))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    def memory_efficient_attention(query, key, value):
        assert query.shape == key.shape == value.shape  # heads are not grouped
        return one_sample(query, key, value)

    def sageattn(q, k, v, tensor_layout="HND"):
        return one_sample(q, k, v, tensor_layout=tensor_layout)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == max(LENGTHS)
        lengths = cu_seqlens_q.diff().tolist()
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        return torch.cat([one_sample(*(x[None] for x in sample))[0] for sample in parts])

    for name, function in (
        ("flash_attn", flash_attn_varlen_func),
        ("xformers", None),
        ("xformers.ops", memory_efficient_attention),
        ("sageattention", sageattn),
    ):
        module = types.ModuleType(name)
        if function is not None:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
    q, k, v = (x.detach() for x in qkv(4, 2))
    packing = Packing.of(LENGTHS, CPU)
    torch.testing.assert_close(attention(q, k, v, packing, kernel), attention(q, k, v, packing, "torch"))
    assert len(called) == len(LENGTHS)
    assert called[0] == ({"tensor_layout": "NHD"} if kernel == "sage" else {})


def test_sage_does_not_lose_gradients_silently():
    with pytest.raises(AssertionError, match="no backward"):
        attention(*qkv(4, 2), Packing.of(LENGTHS, CPU), "sage")


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
