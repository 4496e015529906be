"""Triton's interpreter, mended where it differs from a GPU. To be imported where TRITON_INTERPRET is set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mended() -> dict[str, Callable[..., object]]:
    """Return what replaces functions of `triton.runtime.interpreter`, by their names."""
    return {
        "_convert_float": _rounding(interpreter._convert_float),
        "_patch_lang_tensor": _with_indices(interpreter._patch_lang_tensor),
    }


def _rounding(theirs: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Round to bf16 as GPUs do; the interpreter cuts off."""

    def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return theirs(data, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(data, np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)

    return convert


def _with_indices(theirs: Callable[..., None]) -> Callable[..., None]:
    """Let a number of the interpreter, an array of one element, be a loop's bound.

    Triton 3.6 passes such an array to `int`, which NumPy refuses from 2.4 on.
    """

    def patch(tensor: type, scope: object) -> None:
        theirs(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch
