"""Who computes the memory-bound parts of a block: torch's operations, or Triton kernels of our own.

`library.nn.layers` and `library.nn.modulated` define those parts and ask here, by name, for the function to
call. The answer is one for the whole process and given before a model runs, because parts are also computed
again for backward, by threads that see no context of ours, and must come out the same there.

Triton is imported only if it is chosen. A part that is being compiled by `torch.compile` is never replaced:
the compiler writes such kernels itself.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from library.core.errors import ConfigError, MissingPackageError

OLDEST = (8, 0)  # the compute capability from which on Triton supports NVIDIA's GPUs: Ampere
Part = TypeVar("Part", bound=Callable[..., torch.Tensor])

_replaced: dict[str, Callable[..., torch.Tensor]] = {}


def fused(name: str, own: Part) -> Part:
    """Return the function that computes the part of this name: `own`, or what replaces it."""
    return own if torch.compiler.is_compiling() else _replaced.get(name, own)


def use_fused_kernels(kernels: str, device: torch.device) -> None:
    """Let "torch" or "triton" compute the parts, from now on and in all models.

    Raises:
        ConfigError: Triton cannot be used on the device.
        MissingPackageError: it, or what it needs, is not installed.
    """
    if kernels == "triton":
        _check_triton(device)
    replace_parts(kernels)


def replace_parts(kernels: str) -> None:
    """Do what `use_fused_kernels` does, whatever the device."""
    _replaced.clear()
    if kernels == "triton":
        from library.nn import triton_layers, triton_modulated

        parts = (
            *(triton_layers.scaled_rms_norm, triton_layers.normed_residual),
            *(triton_layers.swiglu, triton_layers.swiglu_back, triton_layers.norm_and_rotate),
            *(triton_modulated.modulated_layer_norm, triton_modulated.gated_residual),
        )
        _replaced.update({part.__name__: part for part in parts})


def _check_triton(device: torch.device) -> None:
    flag = "--fused_kernels triton"
    if device.type != "cuda":
        raise ConfigError(f"{flag} needs an NVIDIA GPU, and this run is on {device.type}; leave it out.")
    if importlib.util.find_spec("triton") is None:
        raise MissingPackageError("triton", flag)
    if torch.version.cuda is not None and torch.cuda.get_device_capability(device) < OLDEST:
        raise ConfigError(
            f"{flag} needs a GPU of the Ampere generation or a later one, and "
            f"{torch.cuda.get_device_name(device)} is older; leave it out."
        )
    if not _has_compiler():
        raise ConfigError(
            f"{flag} needs a C compiler (gcc or clang), with which Triton builds its launchers, and there is "
            "none; install one or leave the flag out."
        )
    from triton import TritonError

    # Of a missing compiler, header or driver library, of a folder for compiled code that cannot be written
    # and of a GPU that this Triton does not know, it tells in as many ways, at the first launch.
    causes = (RuntimeError, AssertionError, ImportError, OSError, subprocess.SubprocessError, TritonError)
    try:
        _run_a_kernel(device)
    except causes as error:
        raise ConfigError(
            f"{flag}: Triton cannot build or run a kernel on {torch.cuda.get_device_name(device)} "
            f"({_first_line(error)}); it needs a C compiler, Python's header files (python3-dev) and a "
            "folder that it can write to (TRITON_CACHE_DIR); mend that or leave the flag out."
        ) from error


def _has_compiler() -> bool:
    """Whether Triton would find a compiler as it looks for one; its builds for Windows bring their own."""
    named = bool(os.environ.get("CC")) or sys.platform == "win32"
    return named or any(shutil.which(name) is not None for name in ("gcc", "clang"))


def _run_a_kernel(device: torch.device) -> None:
    from library.nn.triton_layers import swiglu

    ones = torch.ones(16, device=device)
    swiglu(ones, ones)[0].item()  # waits, so that errors of the device show here


def _first_line(error: BaseException) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), repr(error))
