"""A device to find waits with: tensors on the CPU that count as being on a GPU, and what reads them.

On a GPU a program waits for the device when it reads a number from it, and when it copies something there
without saying `non_blocking`. On the CPU neither shows. So a `PretendedDevice` keeps book of which memory is
"on the device": what is moved or made there by name, and what is computed from that.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations whose result has to be known on the host: a number, or how large a tensor is.
_READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "repeat_interleave"}
_READING_METHODS = {"tolist", "numpy", "cpu"}
_MADE_FROM_DATA = {"tensor", "as_tensor"}


class PretendedDevice(TorchFunctionMode):
    """Use as a context; `waits` then holds where the program would have waited for a GPU."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._storages: dict[int, StorageWeakRef] = {}
        self._below = _Operations(self)
        self.take(tensors)

    def __enter__(self) -> PretendedDevice:
        self._below.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._below.__exit__(*error)

    def take(self, tensors: Iterable[Tensor]) -> None:
        """Count these tensors as being on the device."""
        for tensor in tensors:
            storage = StorageWeakRef(tensor.untyped_storage())  # keeps the address from being used again
            self._storages[storage.cdata] = storage

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device."""
        return tensor.device.type != "meta" and tensor.untyped_storage()._cdata in self._storages

    def wait(self, why: str) -> None:
        """Note that the program would wait here."""
        here = [line for line in traceback.extract_stack() if "/library/" in line.filename]
        place = f"{here[-1].filename.rpartition('/library/')[2]}:{here[-1].lineno}" if here else "?"
        self.waits.append(f"{why} in {place}")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        device = next((x for x in (*args[1:], kwargs.get("device")) if isinstance(x, torch.device)), None)
        mine = bool(args) and isinstance(args[0], Tensor) and self.has(args[0])
        if mine and (name in _READING_METHODS or (name == "to" and "cpu" in args[1:])):
            self.wait(name)
        result = func(*args, **kwargs)
        if device is not None and device.type == "cpu" and isinstance(result, Tensor):
            moved = name == "to" and not mine and not kwargs.get("non_blocking", False)
            if moved or name in _MADE_FROM_DATA:
                self.wait(f"a copy by {name}")
            self.take([result])
        return result


class _Operations(TorchDispatchMode):
    """What is computed from tensors on the device is there too."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(self._device.has(tensor) for tensor in _tensors((args, kwargs))):
            name = func.name().partition("::")[2].partition(".")[0]
            chosen = name.startswith("index") and any(i.dtype == torch.bool for i in _tensors(args[1:2]))
            if name in _READING or chosen:
                self._device.wait(name)
            written = [
                value
                for value, argument in zip(args, func._schema.arguments, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            self._device.take(_tensors((result, written)))
        return result


def _tensors(values: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
