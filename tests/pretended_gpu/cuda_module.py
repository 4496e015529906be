"""What `torch.cuda` cannot do in a torch that was built without CUDA, done with the pretended device."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = torch.device("cuda", 0)
GIB = 2**30


@dataclass(frozen=True)
class Properties:
    """An RTX 3090."""

    name: str = "Pretended GPU"
    major: int = 8
    minor: int = 6
    total_memory: int = 24 * GIB
    multi_processor_count: int = 82
    warp_size: int = 32
    max_threads_per_multi_processor: int = 1536
    regs_per_multiprocessor: int = 65536
    shared_memory_per_block_optin: int = 101376
    L2_cache_size: int = 6 * 2**20


class Event:
    """A point in a stream."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self._number, self._time = 0, 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Be the point up to which a stream was asked for work."""
        self._number = _device.pretended_record((stream or current_stream()).number)
        self._time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Let a stream wait for this point."""
        if self._number:
            _device.pretended_wait((stream or current_stream()).number, self._number)

    def synchronize(self) -> None:
        """Let the program wait for this point."""
        if self._number:
            _device.pretended_finish_event(self._number)

    def query(self) -> bool:
        """Whether the device has come to this point."""
        return True

    def elapsed_time(self, later: Event) -> float:
        """Return milliseconds of the program's, which say nothing about a GPU."""
        return (later._time - self._time) * 1e3


class Stream:
    """A queue of the device; as a context, that in which work is queued."""

    def __init__(self, device: object = None, priority: int = 0, *, number: int | None = None) -> None:
        self.device = DEVICE
        self.number = _device.pretended_new_stream() if number is None else number
        self._before: list[int] = []

    def wait_stream(self, other: Stream) -> None:
        """Let this stream wait for all that another was asked for."""
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        """Let this stream wait for a point in another."""
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        """Return the point up to which this stream was asked for work."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Let the program wait for this stream."""
        _device.pretended_finish_stream(self.number)

    def query(self) -> bool:
        """Whether all is done."""
        return True

    def __enter__(self) -> Stream:
        self._before.append(_device.pretended_stream())
        _device.pretended_use_stream(self.number)
        return self

    def __exit__(self, *_: object) -> None:
        _device.pretended_use_stream(self._before.pop())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.number == self.number

    def __hash__(self) -> int:
        return self.number


class OnlyDevice:
    """`torch.cuda.device`, of which there is one."""

    def __init__(self, device: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def current_stream(device: object = None) -> Stream:
    """Return the stream in which this thread queues work."""
    return Stream(number=_device.pretended_stream())


def install(device: ctypes.CDLL) -> None:
    """Change `torch.cuda`."""
    global _device
    _device = device
    device.pretended_record.restype = ctypes.c_long
    device.pretended_live_bytes.restype = device.pretended_peak_bytes.restype = ctypes.c_long
    device.pretended_wait.argtypes = [ctypes.c_int, ctypes.c_long]
    device.pretended_finish_event.argtypes = [ctypes.c_long]
    torch.version.cuda = "12.8"
    torch.backends.cuda.is_flash_attention_available = lambda: True
    for name, function in {**_questions(), **_memory(), **_streams()}.items():
        setattr(torch.cuda, name, function)
    for name, function in _below().items():
        setattr(torch._C, name, function)
    torch._C._dynamo.guards._empty_strided_cuda = _empty_strided  # which compiled graphs ask for memory
    Tensor.record_stream = _record_stream


def _questions() -> dict[str, object]:
    properties = Properties()
    random = torch.default_generator  # what draws without a generator of its own draws from the CPU's
    return {
        "_initialized": True,
        "_lazy_init": _nothing(),
        "set_device": _nothing(),
        "manual_seed": _nothing(),
        "manual_seed_all": _nothing(),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": OnlyDevice,
        "device_of": OnlyDevice,
        "_exchange_device": lambda number: 0,
        "_maybe_exchange_device": lambda number: 0,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        "get_rng_state": lambda device=None: random.get_state(),
        "set_rng_state": lambda state, device=None: random.set_state(state),
    }


def _memory() -> dict[str, object]:
    total = Properties().total_memory
    return {
        "empty_cache": _nothing(),
        "mem_get_info": lambda device=None: (total - _device.pretended_live_bytes(), total),
        "memory_allocated": lambda device=None: _device.pretended_live_bytes(),
        "memory_reserved": lambda device=None: _device.pretended_live_bytes(),
        "max_memory_allocated": lambda device=None: _device.pretended_peak_bytes(),
        "max_memory_reserved": lambda device=None: _device.pretended_peak_bytes(),
        "reset_peak_memory_stats": lambda device=None: _device.pretended_forget_peak(),
    }


def _streams() -> dict[str, object]:
    return {
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: stream,
        "current_stream": current_stream,
        "default_stream": lambda device=None: Stream(number=0),
        "synchronize": lambda device=None: _device.pretended_finish_all(),
        "is_current_stream_capturing": lambda: False,
    }


def _below() -> dict[str, object]:
    """What torch's own modules import from its library."""
    return {
        "_cuda_getDevice": lambda: 0,
        "_cuda_getDeviceCount": lambda: 1,
        "_cuda_setDevice": _nothing(),
        "_cuda_exchangeDevice": lambda number: 0,
        "_cuda_maybeExchangeDevice": lambda number: 0,
        "_cuda_set_sync_debug_mode": lambda mode: _device.pretended_set_on_wait(mode),
        "_cuda_get_sync_debug_mode": lambda: _device.pretended_get_on_wait(),
        "_cuda_getCurrentRawStream": lambda number: _device.pretended_stream(),
    }


def _empty_strided(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=DEVICE)


def _record_stream(tensor: Tensor, stream: Stream) -> None:
    address = tensor.untyped_storage().data_ptr()
    _device.pretended_tell_allocator(ctypes.c_void_p(address), stream.number)


def _nothing() -> Callable[..., None]:
    """Return a function that does nothing, one for each name: torch's compiler looks them up by identity."""
    return lambda *_, **__: None
