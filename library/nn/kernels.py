"""Who computes the memory-bound parts of a block: torch's operations, or Triton kernels of our own.

`library.nn.layers` and `library.nn.modulated` define those parts and ask here, by name, for the function to
call. The answer is one for the whole process and given before a model runs
(`library.nn.triton_kernels.choice`), because parts are also computed again for backward, by threads that see
no context of ours, and must come out the same there.

Triton is imported only if it is chosen. A part that is being compiled by `torch.compile` is never replaced:
the compiler writes such kernels itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Part = TypeVar("Part", bound=Callable[..., torch.Tensor])

_replaced: dict[str, Callable[..., torch.Tensor]] = {}


def fused(name: str, own: Part) -> Part:
    """Return the function that computes the part of this name: `own`, or what replaces it."""
    return own if torch.compiler.is_compiling() else _replaced.get(name, own)


def replace_parts(kernels: str) -> None:
    """Let "torch" or "triton" compute the parts, from now on and in all models, whatever the device."""
    _replaced.clear()
    if kernels == "triton":
        from library.nn.triton_kernels import layers as triton_layers
        from library.nn.triton_kernels import modulated as triton_modulated

        parts = (
            *(triton_layers.scaled_rms_norm, triton_layers.normed_residual),
            *(triton_layers.swiglu, triton_layers.swiglu_back, triton_layers.norm_and_rotate),
            *(triton_modulated.modulated_layer_norm, triton_modulated.gated_residual),
        )
        _replaced.update({part.__name__: part for part in parts})


def uses_triton() -> bool:
    """Whether Triton kernels compute the parts."""
    return bool(_replaced)
