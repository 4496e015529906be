"""Several processes with a pretended GPU each, as on computers of their own: "nccl" between them, by Gloo.

    MASTER_ADDR=localhost MASTER_PORT=29500 WORLD_SIZE=2 LOCAL_RANK=0 RANK=0 python -m tests.pretended_gpu ...

An exchange is in order in the stream that asks for it, as NCCL's is for who waits for it there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch.futures import Future

from tests.pretended_gpu.memory import on_cpu, used

_NAME = "pretended"


def install(device: ctypes.CDLL) -> None:
    """Be what "nccl" stands for, and let memory be given up while a tensor stays, as FSDP does it."""
    dist.Backend.register_backend(_NAME, Group, devices=["cuda", "cpu"])
    begin = dist.init_process_group

    def init_process_group(backend: str | None = None, **settings: object) -> None:
        begin(_NAME if backend == "nccl" else backend, **settings)

    dist.init_process_group = init_process_group
    dist.is_nccl_available = lambda: True
    torch.UntypedStorage.resize_ = _resizing(device, torch.UntypedStorage.resize_)


class Group(dist.ProcessGroup):
    """The processes, as `torch.distributed` asks them. What it returns is done already."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:  # noqa: N802
        """Return what the backend is called."""
        return _NAME

    @property
    def group_name(self) -> str:
        """Return the name by which torch knows these processes."""
        return dist.distributed_c10d._world.pg_names[self]

    def allreduce(self, tensors: list[Tensor], options: object) -> dist.Work:
        """Add up, or whatever the options say, over the processes."""
        return _done(
            "all_reduce", tensors, tensors, lambda: self._gloo.allreduce(_lent(tensors), options).wait()
        )

    def broadcast(self, tensors: list[Tensor], options: object) -> dist.Work:
        """Send those of one process to all."""
        return _done(
            "broadcast", tensors, tensors, lambda: self._gloo.broadcast(_lent(tensors), options).wait()
        )

    def allgather(self, results: list[list[Tensor]], tensors: list[Tensor], options: object) -> dist.Work:
        """Send those of each process to all."""
        rooms = [_lent(each) for each in results]
        everything = [tensor for each in results for tensor in each]
        return _done(
            "all_gather", tensors, everything, lambda: self._gloo.allgather(rooms, _lent(tensors)).wait()
        )

    def all_gather_single(self, result: Tensor, tensor: Tensor, options: object) -> dist.Work:
        """Send that of each process to all, one after another in one tensor."""
        (room,), (own,) = _lent([result]), _lent([tensor])
        rooms = list(room.view(self.size(), -1).unbind(0))
        return _done(
            "all_gather", [tensor], [result], lambda: self._gloo.allgather([rooms], [own.flatten()]).wait()
        )

    def barrier(self, opts: object) -> dist.Work:
        """Wait until every process is here."""
        return _done("barrier", [], [], lambda: self._gloo.barrier(c10d.BarrierOptions()).wait())


def _done(
    name: str, reads: Sequence[Tensor], writes: Sequence[Tensor], exchange: Callable[[], object]
) -> dist.Work:
    used(name, *([x for x in tensors if x.is_cuda] for tensors in (reads, writes)))
    exchange()
    future: Future[Sequence[Tensor]] = Future()
    future.set_result(writes)
    return c10d._create_work_from_future(future)


def _lent(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [on_cpu(x) if x.is_cuda else x for x in tensors]


def _resizing(device: ctypes.CDLL, theirs: Callable[..., object]) -> Callable[..., object]:
    device.pretended_resize.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def resize_(storage: torch.UntypedStorage, size: int) -> object:
        if storage.device.type != "cuda":
            return theirs(storage, size)
        device.pretended_resize(storage._cdata, size)
        return storage

    return resize_
