"""Whether Triton kernels of our own compute the memory-bound parts of a block: `--fused_kernels`.

What they need is looked for before a model is loaded, the cheapest first. At last all of them are built, run
and compared with torch's operations: a driver, a compiler or a new version of Triton that makes something
else of them is found here, and not in what was trained.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys

import torch

from library.core.errors import ConfigError, MissingPackageError
from library.nn.kernels import replace_parts

OLDEST = (8, 0)  # the compute capability from which on Triton supports NVIDIA's GPUs: Ampere
_FLAG = "--fused_kernels triton"


def use_fused_kernels(kernels: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Let "torch" or "triton" compute the parts, from now on and in all models, or whichever "auto" chooses:
    Triton's on a GPU that can have them.

    Args:
        dtype: the models' own, in which kernels are tried.

    Returns:
        What is in the way of Triton's, if "auto" found that on a GPU: the end of a sentence.

    Raises:
        ConfigError: "triton" cannot be used on the device.
        MissingPackageError: it is not installed.
    """
    obstacle = None
    if kernels == "triton":
        if device.type == "cuda" and importlib.util.find_spec("triton") is None:
            raise MissingPackageError("triton", _FLAG)
        if (obstacle := _obstacle(device, dtype)) is not None:
            raise ConfigError(f"{_FLAG} cannot be used: {obstacle}. Mend that or leave the flag out.")
    elif kernels == "auto":
        kernels = "torch"
        if device.type == "cuda":
            obstacle = _obstacle_unless_asked_for(device, dtype)
            kernels = "triton" if obstacle is None else "torch"
    replace_parts(kernels)
    return obstacle


def _obstacle_unless_asked_for(device: torch.device, dtype: torch.dtype) -> str | None:
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, so that Python would compute them"
    return _obstacle(device, dtype)


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what is in the way of Triton's kernels: the end of a sentence."""
    if device.type != "cuda":
        return f"its kernels need an NVIDIA GPU, and this run is on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "its kernels need the package triton, which is not installed: run `pip install triton`"
    name = torch.cuda.get_device_name(device)
    if torch.version.cuda is not None and torch.cuda.get_device_capability(device) < OLDEST:
        return f"its kernels need a GPU of the Ampere generation or a later one, and {name} is older"
    if not _has_compiler():
        return "Triton builds its launchers with a C compiler (gcc or clang), and there is none"
    try:
        from triton import TritonError
    except _CAUSES as error:
        return f"the package triton is installed and cannot be imported ({_first_line(error)})"
    try:
        differing = _differing_parts(device, dtype)
    except (*_CAUSES, TritonError) as error:
        torch.cuda.synchronize(device)  # raises where that error has left the device of no use to anyone
        return (
            f"Triton cannot build or run its kernels on {name} ({_first_line(error)}), for which it needs a "
            "C compiler, Python's header files (python3-dev) and a folder that it can write to "
            "(TRITON_CACHE_DIR)"
        )
    return f"on {name} its kernels differ from torch's ({', '.join(differing)})" if differing else None


# Of a missing compiler, header or library, of a folder for compiled code that cannot be written, of a GPU or
# an option that this Triton does not know, it tells in as many ways, at the first launch.
_CAUSES = (
    *(RuntimeError, AssertionError, ImportError, OSError, subprocess.SubprocessError),
    *(ValueError, LookupError, TypeError, AttributeError),
)


def _has_compiler() -> bool:
    """Whether Triton would find a compiler as it looks for one; its builds for Windows bring their own."""
    named = bool(os.environ.get("CC")) or sys.platform == "win32"
    return named or any(shutil.which(name) is not None for name in ("gcc", "clang"))


def _differing_parts(device: torch.device, dtype: torch.dtype) -> list[str]:
    from library.nn.triton_kernels.check import differing_parts

    return differing_parts(device, dtype)


def _first_line(error: BaseException) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), repr(error))
