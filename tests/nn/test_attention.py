"""Attention over packed samples."""

import sys
import types
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.attention.varlen
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend

from library.core.errors import ConfigError, MissingPackageError
from library.nn import products
from library.nn.attention import (
    _try,
    _varlen_is_better,
    attention,
    plain_attention,
    prepare_kernel,
)
from library.nn.packing import Packing
from library.nn.stand_in import meta_standing_for

LENGTHS = (7, 1, 12)
KEY_LENGTHS = (3, 9, 5)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def qkv(heads, kv_heads, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(sum(LENGTHS), count, 8, generator=generator).to(dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )


def cross_qkv(heads, kv_heads):
    q, k, v = qkv(heads, kv_heads)
    count = sum(KEY_LENGTHS)
    return q, k.detach()[:count].requires_grad_(), v.detach()[:count].requires_grad_()


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


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3)])
def test_keys_of_other_lengths(heads, kv_heads):
    packing, keys = Packing.of(LENGTHS, CPU), Packing.of(KEY_LENGTHS, CPU)
    q, k, v = cross_qkv(heads, kv_heads)
    ours = attention(q, k, v, packing, keys=keys)
    reference = plain_attention(q, k, v, packing, keys).flatten(1)
    torch.testing.assert_close(ours, reference)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        torch.autograd.grad(ours, (q, k, v), weights),
        torch.autograd.grad(reference, (q, k, v), weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    alone = attention(q[:7], k[:3], v[:3], Packing.of((7,), CPU), keys=Packing.of((3,), CPU))
    assert torch.equal(ours[:7], alone)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_on_the_meta_device_without_a_table_of_scores(kind, dtype, kv_heads):
    lengths, key_lengths = (500, 300), (40, 700)
    q = torch.empty(800, 4, 16, dtype=dtype, device="meta", requires_grad=True)
    k = torch.empty(740, kv_heads, 16, dtype=dtype, device="meta", requires_grad=True)
    packing, keys = (Packing.of(each, torch.device("meta")) for each in (lengths, key_lengths))
    kept = []
    with meta_standing_for(kind), saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        for kernel in ("auto", "torch"):
            out = attention(q, k, k, packing, kernel, keys=keys)
            assert out.shape == (800, 64) and out.dtype == dtype
            grads = torch.autograd.grad(out, (q, k), torch.empty_like(out))
            assert [grad.shape for grad in grads] == [q.shape, k.shape]
    assert max(kept) <= q.numel()


@pytest.mark.parametrize(
    ("dtype", "old", "alone"),
    [
        (torch.float32, False, False),
        (torch.float16, True, False),
        (torch.bfloat16, True, False),
        (torch.bfloat16, False, True),
    ],
)
def test_on_a_gpu_no_kernel_makes_a_table_of_scores(monkeypatch, dtype, old, alone):
    """For grouped queries all but flash attention would, so keys and values are repeated; before Ampere all
    would for bf16, so that is fp32."""
    for module in ("attention", "products"):
        monkeypatch.setattr(f"library.nn.{module}.device_kind", lambda _: "cuda")
    monkeypatch.setattr("library.nn.attention.before_ampere", lambda _: old)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    real, told = torch.nn.functional.scaled_dot_product_attention, []

    def recorded(q, k, v, *, enable_gqa):
        told.append((q.dtype, enable_gqa, q.shape[1] == k.shape[1]))
        return real(q, k, v, enable_gqa=enable_gqa)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    inputs = qkv(4, 2, dtype)
    packing = Packing.of(LENGTHS, CPU)
    ours = attention(*inputs, packing, "torch")
    attended_in = torch.float32 if old and dtype == torch.bfloat16 else dtype
    assert told == [(attended_in, alone, not alone)] * len(LENGTHS)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, plain_attention(*inputs, packing).flatten(1), rtol=2e-2, atol=2e-2)
    weights = torch.ones_like(ours)
    of_ours, of_plain = (
        torch.autograd.grad(out, inputs, weights)
        for out in (ours, plain_attention(*inputs, packing).flatten(1))
    )
    for one, other in zip(of_ours, of_plain, strict=True):
        torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)


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
        prepare_kernel("paged", CPU, torch.float32)
    with pytest.raises(ConfigError, match="'varlen' needs a CUDA device, not cpu; use 'torch'"):
        prepare_kernel("varlen", CPU, torch.bfloat16)
    with pytest.raises(ConfigError, match="'varlen' needs bf16 or fp16, not torch.float32; use 'torch'"):
        prepare_kernel("varlen", CUDA, torch.float32)
    with pytest.raises(ConfigError, match="'cudnn' needs bf16 or fp16, not torch.float32; use 'torch'"):
        prepare_kernel("cudnn", CUDA, torch.float32)
    with pytest.raises(ConfigError, match="'flash' needs a CUDA device"):  # no package would help
        prepare_kernel("flash", CPU, torch.bfloat16)
    for kernel in ("auto", "torch", "sdpa"):
        prepare_kernel(kernel, CPU, torch.float32)


def test_cudnn_is_asked_for_or_not_used(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", set_to.append)
    prepare_kernel("auto", CPU, torch.bfloat16)
    assert set_to == []
    prepare_kernel("auto", CUDA, torch.bfloat16)
    assert set_to == [False]


def test_a_device_that_cudnn_cannot_serve(monkeypatch):
    """Such as this one: torch has no way to run it on a CPU, and says so when it is called."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "the processor")
    with pytest.raises(ConfigError, match=r"'cudnn' cannot be had on the processor: .+; use 'torch'\.$"):
        _try("cudnn", CPU, torch.bfloat16)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("flash_attn_2_cuda.so: undefined symbol: _ZNK3c1011StorageImpl"),
        RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nException raised from"),
        NotImplementedError(),
        ValueError("No operator found"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("kernel", ["flash", "xformers", "sage"])
def test_a_package_that_is_there_and_does_not_work(monkeypatch, kernel, error):
    """At the start, and not after the model was loaded."""

    def fail(*_):
        raise error

    module = types.ModuleType("stand-in")
    for name in ("flash_attn_varlen_func", "memory_efficient_attention", "sageattn"):
        setattr(module, name, fail if name != "sageattn" else lambda *_, tensor_layout: fail())
    for name in ("flash_attn", "xformers", "xformers.ops", "sageattention"):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "the processor")
    with pytest.raises(
        ConfigError, match=f"'{kernel}' cannot be had on the processor: .*; use 'torch'"
    ) as told:
        _try(kernel, CPU, torch.bfloat16)
    assert "\n" not in str(told.value) and ": ;" not in str(told.value)


def test_a_build_of_torch_without_flash_attention(monkeypatch):
    """Batches of several pictures are computed one by one there, and nobody gets varlen who asks for it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("library.nn.attention.device_kind", lambda _: "cuda")
    monkeypatch.setattr("library.nn.attention._try", lambda *_: None)
    q, *_ = qkv(4, 2, torch.bfloat16)
    packing = Packing.of(LENGTHS, CPU)
    for there in (False, True):
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda there=there: there)
        assert _varlen_is_better(q, packing) is there
        with nullcontext() if there else pytest.raises(ConfigError, match="this build of torch lacks; use"):
            prepare_kernel("varlen", CUDA, torch.bfloat16)


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
        prepare_kernel(kernel, CUDA, torch.bfloat16)


@pytest.mark.parametrize("kernel", ["flash", "xformers", "sage", "varlen", "varlen 2.11", "cudnn"])
def test_packages_are_called_as_they_want_to_be(monkeypatch, kernel):
    """With stand-ins that take what the packages take (flash-attn 2.8, xformers 0.0.3x, sageattention 2), and
    for torch's varlen, which needs a GPU: 2.13 must be told of grouped heads, 2.11 has no word for them."""
    called = []

    def one_sample(q_1THD, k_1TKD, v_1TKD, **more):
        called.append(more)
        q, k, v = (x.transpose(1, 2) for x in (q_1THD, k_1TKD, v_1TKD))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    def memory_efficient_attention(query, key, value):
        assert query.shape[2:] == key.shape[2:] == value.shape[2:]  # heads are not grouped
        return one_sample(query, key, value)

    def sageattn(q, k, v, tensor_layout="HND"):
        return one_sample(q, k, v, tensor_layout=tensor_layout)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        lengths, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert max_seqlen_q == max(lengths) and max_seqlen_k == max(keys)
        parts = zip(q.split(lengths), k.split(keys), v.split(keys), strict=True)
        return torch.cat([one_sample(*(x[None] for x in sample))[0] for sample in parts])

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, enable_gqa=False):
        assert enable_gqa
        return flash_attn_varlen_func(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)

    def old_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None):
        return flash_attn_varlen_func(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)

    @contextmanager
    def sdpa_kernel(backend):
        assert backend == SDPBackend.CUDNN_ATTENTION
        called.append({})
        yield

    kernel, _, version = kernel.partition(" ")
    varlen_attn = old_varlen_attn if version else varlen_attn
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr("library.nn.attention.sdpa_kernel", sdpa_kernel)
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
    _try(kernel, CPU, torch.bfloat16)
    called.clear()
    q, k, v = (x.detach() for x in qkv(4, 2))
    packing = Packing.of(LENGTHS, CPU)
    torch.testing.assert_close(attention(q, k, v, packing, kernel), attention(q, k, v, packing, "torch"))
    assert len(called) == len(LENGTHS)
    q, k, v = (x.detach() for x in cross_qkv(4, 2))
    keys = Packing.of(KEY_LENGTHS, CPU)
    crossed = [attention(q, k, v, packing, each, keys=keys) for each in (kernel, "torch")]
    torch.testing.assert_close(*crossed)
    assert called[0] == ({"tensor_layout": "NHD"} if kernel == "sage" else {})


def test_sage_does_not_lose_gradients_silently():
    with pytest.raises(AssertionError, match="no backward"):
        attention(*qkv(4, 2), Packing.of(LENGTHS, CPU), "sage")


@pytest.mark.gpu
@pytest.mark.parametrize("cross", [False, True])
def test_varlen_is_the_formula(cross):
    packing, keys = Packing.of(LENGTHS, CUDA), Packing.of(KEY_LENGTHS if cross else LENGTHS, CUDA)
    inputs = cross_qkv(4, 2) if cross else qkv(4, 2)
    inputs = [x.detach().to(CUDA, torch.bfloat16).requires_grad_() for x in inputs]
    weights = torch.randn(sum(LENGTHS), 32, device=CUDA)
    ours = attention(*inputs, packing, "varlen", keys=keys)
    reference = plain_attention(*(x.float() for x in inputs), packing, keys).flatten(1)
    torch.testing.assert_close(ours.float(), reference, rtol=3e-2, atol=3e-2)
    grads = torch.autograd.grad(ours, inputs, weights.bfloat16())
    for one, other in zip(grads, torch.autograd.grad(reference, inputs, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)
