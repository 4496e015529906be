"""Attention over packed sequences: the tokens of all samples lie end to end, and each sample attends to
itself alone. In cross-attention keys and values are a packed sequence of their own, of other lengths.

There is no padding and no mask. Keys and values may have fewer heads than queries (grouped queries); they
are repeated only for kernels that want it so. Kernels:

- `torch`, or `sdpa`: torch's scaled_dot_product_attention, one call a sample. Every device and dtype. On
  CUDA its own kernels, not cuDNN's.
- `cudnn`: the same through cuDNN. CUDA, bf16 or fp16. It makes a plan for each new number of tokens, forward
  and backward, which takes up to a second: fast once all lengths of captions and all buckets have been seen.
- `varlen`: torch.nn.attention.varlen, one call a batch. CUDA, bf16 or fp16.
- `flash`: the flash-attn package, one call a batch. CUDA, bf16 or fp16.
- `xformers`: the xformers package, one call a sample. CUDA.
- `sage`: the sageattention package, one call a sample, in 8 bits. CUDA, bf16 or fp16; has no backward pass.
- `auto`: `varlen` where it can be used and the batch has several samples, else `torch`.

Shape legend: T packed tokens, S those of keys and values, H query heads, K key/value heads, D features of a
head.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.core.device import before_ampere
from library.core.errors import ConfigError, MissingPackageError
from library.nn.packing import Packing
from library.nn.products import product_dtype
from library.nn.running.recompute import cheap
from library.nn.stand_in import device_kind

KERNELS = ("auto", "torch", "sdpa", "cudnn", "varlen", "flash", "xformers", "sage")
_HALF = (torch.bfloat16, torch.float16)
_PACKAGES = {  # kernel: what is imported, and what pip installs
    "flash": ("flash_attn", "flash-attn --no-build-isolation"),
    "xformers": ("xformers", "xformers"),
    "sage": ("sageattention", "sageattention --no-build-isolation"),
}
_ONLY_HALF = ("cudnn", "varlen", "flash", "sage")


def prepare_kernel(kernel: str, device: torch.device, dtype: torch.dtype | None) -> None:
    """Refuse a kernel that cannot work, before anything is computed. Whatever the kernel, SDPA is kept from
    choosing cuDNN by itself, in the whole process: on Hopper and Blackwell it would, from torch 2.11 on.

    Raises:
        ConfigError: an unknown kernel, or one that the device or dtype does not support.
        MissingPackageError: the package of a kernel is not installed.
    """
    if kernel not in KERNELS:
        raise ConfigError(f"There is no attention kernel '{kernel}'; choose one of {', '.join(KERNELS)}.")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    if kernel in ("auto", "torch", "sdpa"):
        return
    if device.type != "cuda":
        raise ConfigError(f"Attention kernel '{kernel}' needs a CUDA device, not {device.type}; use 'torch'.")
    if kernel in _PACKAGES and importlib.util.find_spec(_PACKAGES[kernel][0]) is None:
        package, install = _PACKAGES[kernel]
        raise MissingPackageError(package, f"Attention kernel '{kernel}'", install)
    if kernel in _ONLY_HALF and dtype not in _HALF:
        raise ConfigError(f"Attention kernel '{kernel}' needs bf16 or fp16, not {dtype}; use 'torch'.")
    if kernel in _ONLY_HALF and before_ampere(device):
        raise ConfigError(
            f"Attention kernel '{kernel}' needs a GPU of the Ampere generation or a later one, and "
            f"{torch.cuda.get_device_name(device)} is older; use 'torch'."
        )
    if kernel == "varlen" and not torch.backends.cuda.is_flash_attention_available():
        raise ConfigError(
            "Attention kernel 'varlen' is torch's own flash attention, which this build of torch lacks; "
            "use 'torch', or 'flash' with the package flash-attn."
        )
    _try(kernel, device, dtype)


def _try(kernel: str, device: torch.device, dtype: torch.dtype) -> None:
    """Attend once, and back: a package may be built for another torch or for other GPUs."""
    packing, trains = Packing.of((40, 24), device), kernel != "sage"
    q_THD = torch.zeros(64, 4, 96, dtype=dtype, device=device, requires_grad=trains)
    k_TKD = torch.zeros(64, 2, 96, dtype=dtype, device=device, requires_grad=trains)
    try:
        y_TF = attention(q_THD, k_TKD, k_TKD, packing, kernel)
        if trains:
            y_TF.sum().backward()
    except (ImportError, OSError, RuntimeError, AssertionError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"Attention kernel '{kernel}' cannot be had on {name}: {reason}; use 'torch'."
        ) from error


def attention(
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    packing: Packing,
    kernel: str = "auto",
    *,
    keys: Packing | None = None,
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v within each sample, (T, H * D).

    Args:
        packing: of the queries, and of keys and values too unless `keys` is given.
        keys: of keys and values, with as many samples; each has at least one key.
    """
    keys = packing if keys is None else keys
    if kernel == "auto":
        kernel = "varlen" if _varlen_is_better(q_THD, packing) else "torch"
    if kernel in _OF_A_BATCH:
        return _OF_A_BATCH[kernel](q_THD, k_SKD, v_SKD, packing, keys).flatten(1)
    call = _OF_A_SAMPLE[kernel]
    parts = [call(*sample) for sample in _samples(q_THD, k_SKD, v_SKD, packing, keys)]
    # kernels keep their own results for backward, so what is only a copy of them is made again
    return (parts[0] if len(parts) == 1 else cheap(_joined, *parts)).flatten(1)


def plain_attention(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, packing: Packing, keys: Packing | None = None
) -> Tensor:
    """The formula, written out for one sample after another; returns (T, H, D). Reference for the kernels."""
    parts = []
    for q, k, v in _samples(q_THD, k_SKD, v_SKD, packing, packing if keys is None else keys):
        k, v = _for_every_query(q, k, v)
        scores_HTS = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        parts.append(torch.einsum("hqk,khd->qhd", scores_HTS.softmax(-1), v))
    return torch.cat(parts)


def _varlen_is_better(q_THD: Tensor, packing: Packing) -> bool:
    """torch's varlen kernel is written for NVIDIA; a single sample is best left to SDPA's choice."""
    if device_kind(q_THD) != "cuda" or q_THD.dtype not in _HALF or len(packing.lengths) == 1:
        return False
    return q_THD.is_meta or (
        torch.version.cuda is not None
        and torch.backends.cuda.is_flash_attention_available()  # some builds lack it, such as for Windows
        and not before_ampere(q_THD.device)
    )


def _samples(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, keys: Packing
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    if len(packing.lengths) == 1:  # a slice of all rows would be copied in backward
        return iter([(q, k, v)])
    ours, theirs = list(packing.lengths), list(keys.lengths)
    return zip(q.split(ours), k.split(theirs), v.split(theirs), strict=True)


def _for_every_query(q_THD: Tensor, *others_SKD: Tensor) -> list[Tensor]:
    """Repeat the heads of keys and values until there is one for each query head."""
    heads = q_THD.shape[1]
    return [x if x.shape[1] == heads else cheap(_repeated, x, heads // x.shape[1]) for x in others_SKD]


def _repeated(x_SKD: Tensor, times: int) -> Tensor:
    return x_SKD.repeat_interleave(times, dim=1)


# ---- kernels that take one sample: q (T, H, D), k and v (S, K, D) -> (T, H, D) ----


def _torch(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor:
    given, dtype = q_THD.dtype, _sdpa_dtype(q_THD)
    if dtype != given:
        q_THD, k_SKD, v_SKD = (cheap(_as, x, dtype) for x in (q_THD, k_SKD, v_SKD))
    if q_THD.shape[1] != k_SKD.shape[1] and not _takes_groups(q_THD):
        k_SKD, v_SKD = _for_every_query(q_THD, k_SKD, v_SKD)
    y_THD = _sdpa(q_THD, k_SKD, v_SKD)
    return y_THD if dtype == given else cheap(_as, y_THD, given)


def _sdpa_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype for SDPA to attend in. In bf16, GPUs before Ampere have no kernel but one that makes a
    table of scores, of every query with every key."""
    if x.dtype == torch.bfloat16 and device_kind(x) == "cuda" and not x.is_meta:
        return torch.float32 if before_ampere(x.device) else torch.bfloat16
    return product_dtype(x)


def _takes_groups(q_THD: Tensor) -> bool:
    """Whether SDPA has a kernel for grouped queries here that makes no table of scores. Of torch's for CUDA
    only flash attention is one."""
    if device_kind(q_THD) != "cuda":
        return True
    if q_THD.dtype not in _HALF:
        return False
    if q_THD.is_meta or torch.version.cuda is None:
        return True
    return torch.backends.cuda.is_flash_attention_available() and not before_ampere(q_THD.device)


def _cudnn(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor:
    k_SHD, v_SHD = _for_every_query(q_THD, k_SKD, v_SKD)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q_THD, k_SHD, v_SHD)


def _sdpa(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor:
    q_1HTD, k_1KSD, v_1KSD = (x.transpose(0, 1).unsqueeze(0) for x in (q_THD, k_SKD, v_SKD))
    if q_THD.is_meta:
        out_1HTD = _sdpa_on_meta(q_1HTD, k_1KSD, v_1KSD)
    else:
        grouped = q_THD.shape[1] != k_SKD.shape[1]
        out_1HTD = F.scaled_dot_product_attention(q_1HTD, k_1KSD, v_1KSD, enable_gqa=grouped)
    return out_1HTD.squeeze(0).transpose(0, 1)


def _sdpa_on_meta(q_1HTD: Tensor, k_1KSD: Tensor, v_1KSD: Tensor) -> Tensor:
    """Take the kernel that SDPA takes on the device that is stood in for, not the one with a table of scores
    that it takes on the meta device."""
    if device_kind(q_1HTD) == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_1HTD, k_1KSD, v_1KSD)[0]
    if q_1HTD.dtype in _HALF:
        return torch.ops.aten._scaled_dot_product_flash_attention(q_1HTD, k_1KSD, v_1KSD)[0]
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q_1HTD, k_1KSD, v_1KSD, None, compute_log_sumexp=torch.is_grad_enabled())[0]


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def _joined(*parts_THD: Tensor) -> Tensor:
    return torch.cat(parts_THD)


def _xformers(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    k_SHD, v_SHD = _for_every_query(q_THD, k_SKD, v_SKD)
    return memory_efficient_attention(q_THD[None], k_SHD[None], v_SHD[None]).squeeze(0)


def _sage(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor:
    assert not q_THD.requires_grad, "SageAttention has no backward pass"
    from sageattention import sageattn

    return sageattn(q_THD[None], k_SKD[None], v_SKD[None], tensor_layout="NHD").squeeze(0)


# ---- kernels that take a whole batch ----


def _varlen(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, packing: Packing, keys: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped = q_THD.shape[1] != k_SKD.shape[1]
    named = {"enable_gqa": True} if grouped and _must_be_told_of_groups(varlen_attn) else {}
    return varlen_attn(q_THD, k_SKD, v_SKD, *_places(packing, keys), **named)


@functools.cache
def _must_be_told_of_groups(varlen_attn: Callable[..., Tensor]) -> bool:
    """Whether torch asks to be told that there are fewer heads of keys than of queries. Its kernels take them
    in any case: 2.11 passes them on without a word, and 2.13 refuses them unless told."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _flash(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, packing: Packing, keys: Packing) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q_THD, k_SKD, v_SKD, *_places(packing, keys))


def _places(packing: Packing, keys: Packing) -> tuple[Tensor, Tensor, int, int]:
    """Where samples end, of queries and of keys, and the longest of either."""
    return packing.ends, keys.ends, max(packing.lengths), max(keys.lengths)


_OF_A_SAMPLE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "torch": _torch,
    "sdpa": _torch,
    "cudnn": _cudnn,
    "xformers": _xformers,
    "sage": _sage,
}
_OF_A_BATCH: dict[str, Callable[[Tensor, Tensor, Tensor, Packing, Packing], Tensor]] = {
    "varlen": _varlen,
    "flash": _flash,
}
