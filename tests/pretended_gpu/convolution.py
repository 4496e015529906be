"""The pretended GPU's convolution: its result is laid out as cuDNN's, in channels last if a factor is."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.pretended_gpu.memory import on_cpu, used

_library = torch.library.Library("aten", "IMPL")  # its kernel is there as long as it is


def install() -> None:
    """Register the kernel, and tell torch's compiler of the layout."""
    _library.impl("convolution", _convolution, "CUDA")
    torch._C._conv_determine_backend_memory_format = lambda x, weight, backend: _layout(x, weight)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *how: object) -> Tensor:
    given = [x, weight, *([] if bias is None else [bias])]
    found = torch.ops.aten.convolution(
        on_cpu(x), on_cpu(weight), None if bias is None else on_cpu(bias), *how
    )
    result = torch.empty(found.shape, dtype=x.dtype, device=x.device, memory_format=_layout(x, weight))
    used("convolution", reads=given, writes=[result])
    on_cpu(result).copy_(found)
    return result


def _layout(*factors: Tensor) -> torch.memory_format:
    for x in factors:
        if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format
