"""Puts the pretended GPU in the place of a real one. To be called before torch is imported."""

from __future__ import annotations

import ctypes
import logging
import os
import sys

from tests.pretended_gpu.build import library


def install() -> None:
    """Load the device, then torch, and tell `torch.cuda` of it."""
    assert "torch" not in sys.modules, "the device's library must be there before torch"
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when a kernel is defined
    # What it defines is found before what torch's libraries define under the same name.
    device = ctypes.CDLL(str(library()), ctypes.RTLD_GLOBAL)

    # It tells, with a traceback, that it cannot load its kernels for CUDA.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)

    from tests.pretended_gpu import attention, convolution, cuda_module, group, memory, norm, triton_module

    cuda_module.install(device)
    memory.install(device)
    attention.install()
    convolution.install()
    group.install(device)
    norm.install()
    triton_module.install()
