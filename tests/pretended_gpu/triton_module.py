"""Triton on the pretended GPU: kernels, ours and those that `torch.compile` writes, run in its interpreter.

Nothing is compiled for a GPU, and a kernel takes a thousand times as long as it would on one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.language.extra import libdevice
from triton.runtime import interpreter

from tests.pretended_gpu.cuda_module import DEVICE, Properties
from tests.pretended_gpu.memory import on_cpu, used, whole_storage
from tests.triton_interpreter import mended

# Of CUDA's library of functions, those that torch has under the same name.
_FUNCTIONS = (
    *("exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "pow"),
    *("sin", "cos", "tanh", "erf", "floor", "ceil", "trunc"),
)


def install() -> None:
    """Let Triton find the device, and its interpreter the device's memory. TRITON_INTERPRET must be set."""
    assert triton.knobs.runtime.interpret, "Triton's interpreter must be on before Triton is imported"
    backends["nvidia"] = dataclasses.replace(backends["nvidia"], driver=Driver)
    for name, function in mended().items():
        setattr(interpreter, name, function)
    interpreter.GridExecutor = OnDevice
    for name in (name for name in vars(libdevice) if not name.startswith("_")):
        setattr(libdevice, name, _by_torch(name) if name in _FUNCTIONS else _unknown(name))


class Driver(GPUDriver):
    """What Triton asks of a GPU's driver, without one."""

    @classmethod
    def is_active(cls) -> bool:
        """Whether there is a device."""
        return True

    def get_current_target(self) -> GPUTarget:
        """Return what kernels would be compiled for."""
        properties = Properties()
        return GPUTarget("cuda", 10 * properties.major + properties.minor, properties.warp_size)

    def get_active_torch_device(self) -> torch.device:
        """Return the device."""
        return DEVICE

    def get_benchmarker(self) -> Callable[..., float]:
        """Refuse: times in the interpreter say nothing."""
        raise NotImplementedError("the pretended GPU says nothing about speed")

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Refuse: nothing is compiled."""
        raise NotImplementedError("no launcher is compiled for the pretended GPU")


class OnDevice(interpreter.GridExecutor):
    """Runs a kernel on the device's memory as it is, and tells the device what it read and wrote."""

    def __call__(self, *inputs: object, **named: object) -> None:
        """Run all programs of the kernel. What is not as it was before has been written."""
        name = self.fn.__name__
        tensors = [x for x in (*inputs, *named.values()) if _is_on_device(x)]
        used(name, reads=tensors, writes=())
        before = [whole_storage(x, torch.uint8).clone() for x in tensors]
        super().__call__(*inputs, **named)
        after = [whole_storage(x, torch.uint8) for x in tensors]
        changed = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
        used(name, reads=(), writes=[x for x, other in zip(tensors, changed, strict=True) if other])

    def _init_args_hst(
        self, inputs: tuple[object, ...], named: dict[str, object]
    ) -> tuple[list[object], dict[str, object]]:
        return [_lent(x) for x in inputs], {name: _lent(x) for name, x in named.items()}

    def _restore_args_dev(self, *_: object) -> None:
        """Nothing was copied."""


def _is_on_device(x: object) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cuda"


def _lent(x: object) -> object:
    return on_cpu(x) if _is_on_device(x) else x


def _by_torch(name: str) -> Callable[..., tl.tensor]:
    def function(*inputs: object) -> tl.tensor:
        arrays = [x.handle.data if isinstance(x, tl.tensor) else np.asarray(x) for x in inputs]
        result = getattr(torch, name)(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
        like = next(x for x in inputs if isinstance(x, tl.tensor) and x.handle.data.shape == result.shape)
        return tl.tensor(interpreter.TensorHandle(result.numpy(), like.handle.dtype), like.type)

    return function


def _unknown(name: str) -> Callable[..., tl.tensor]:
    def function(*_: object) -> tl.tensor:
        raise NotImplementedError(f"tests/pretended_gpu/triton_module.py knows no libdevice.{name}")

    return function
