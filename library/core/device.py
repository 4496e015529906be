"""Devices and dtypes by name, and how much memory is in use."""

from __future__ import annotations

import ctypes
import platform
import sys

import torch

from library.core.errors import ConfigError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "float": torch.float32,
    "no": torch.float32,  # --mixed_precision no
}


def dtype_named(name: str) -> torch.dtype:
    """Return the torch dtype that a flag calls `name`. Raises ConfigError for an unknown name."""
    if name not in _DTYPES:
        raise ConfigError(f"unknown precision '{name}'; choose one of {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def best_device() -> torch.device:
    """Return the accelerator that torch sees (CUDA, XPU, MPS ...), or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def device_named(name: str | None) -> torch.device:
    """Return the device that a flag names, None being the best one; prove that something can be put there.

    A GPU that is named by its number becomes the current one of this thread.

    Raises:
        ConfigError: there is no such device.
    """
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts when it was built without CUDA
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"--device {name} cannot be used: {reason}.") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(
            device
        )  # kernels of other packages run on the current one, wherever tensors are
    return device


def before_ampere(device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU older than Ampere, which has neither bf16 nor flash attention."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) < (8, 0)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a small CPU tensor's copy on a device; neither the program nor the device waits for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: allocated on the device for CUDA, resident for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil  # comes with accelerate; POSIX has the peak in its standard library

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak_memory(device: torch.device) -> None:
    """Let the peak of a GPU's memory count from now on. That of the computer's cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def keep_freed_memory() -> None:
    """Let this process keep the CPU memory that it frees, for its next step. Only glibc has this.

    Otherwise glibc gives the memory of a step's activations back to the system, and the next step gets it
    again page by page, which is a twentieth of a step's time.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    most = 2**31 - 1
    for threshold in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        mallopt(threshold, most)


def empty_cache(device: torch.device) -> None:
    """Give memory of freed models back, so that the next model finds it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
