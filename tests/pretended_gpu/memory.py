"""The pretended GPU's memory, for kernels that Python computes on it instead of the device's library."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor


def install(device: ctypes.CDLL) -> None:
    """Say whose memory it is."""
    global _device
    _device = device
    device.pretended_used.restype = ctypes.c_char_p


def on_cpu(x: Tensor) -> Tensor:
    """Return a tensor of the CPU with the memory of one on the device."""
    return whole_storage(x, x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())


def whole_storage(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return all memory that a tensor on the device is a view of, as a row of numbers on the CPU."""
    storage = x.untyped_storage()
    memory = (ctypes.c_byte * storage.nbytes()).from_address(storage.data_ptr())
    return torch.frombuffer(memory, dtype=dtype) if storage.nbytes() else torch.empty(0, dtype=dtype)


def used(name: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
    """Tell the device what a kernel reads and writes, which is an error if it is not in order."""
    for tensors, written in ((reads, False), (writes, True)):
        for x in tensors:
            address = ctypes.c_void_p(x.untyped_storage().data_ptr())
            if fault := _device.pretended_used(name.encode(), address, written):
                raise RuntimeError(fault.decode())
