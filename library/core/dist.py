"""The processes of a run: who am I, and what do we agree on. The only file that imports accelerate."""

from __future__ import annotations

import atexit
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor

from library.core.device import best_device
from library.core.errors import ConfigError
from library.core.lifeline import Lifeline

# How long processes wait for each other: as long as the main one may draw pictures. A process that dies is
# noticed by the lifeline and not by this; NCCL's own ten minutes would end a run that is in good health.
_PATIENCE = timedelta(hours=6)
_PIECE = 2**26  # numbers of gradients that are exchanged at once


@dataclass(frozen=True)
class Sharding:
    """How the frozen model is spread over the processes, as accelerate's configuration of FSDP says.

    reshard_after_forward: let a block's weights go after its forward, and gather them again for backward.
    """

    reshard_after_forward: bool


@dataclass(frozen=True)
class Processes:
    """This process among those that `accelerate launch` started. `rank` 0 writes files and speaks.

    `sharding`: how the frozen model is spread over the processes; None if each has all of it.
    """

    accelerator: Accelerator
    sharding: Sharding | None = None

    @classmethod
    def start(cls, timeout_minutes: int | None = None) -> Processes:
        """Join the process group.

        Precision is handled by our own models, so accelerate gets none to apply.

        Raises:
            ConfigError: there are more processes than GPUs, or FSDP is configured in a way that is not used.
        """
        device = best_device()
        _check_gpus(device)
        sharding = _sharding()  # read first: accelerate reads it too, and knows fewer words for a mistake
        timeout = _PATIENCE if timeout_minutes is None else timedelta(minutes=timeout_minutes)
        # Without being told of the CPU, accelerate takes each of several processes there for the only one.
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        )
        if accelerator.num_processes > 1 and device.type == "cpu":
            atexit.register(_leave_gloo)
        return cls(accelerator, sharding if accelerator.num_processes > 1 else None)

    def tied(self) -> AbstractContextManager[object]:
        """Until the block ends, end all processes as soon as one ends; see `library.core.lifeline`.

        Raises:
            ConfigError: a process cannot be reached.
        """
        return nullcontext() if self.world == 1 else Lifeline.between(self.rank, self.world, self.agree)

    @property
    def rank(self) -> int:
        """This process's number over all machines."""
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        """How many processes there are."""
        return self.accelerator.num_processes

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()

    def agree(self, value: object) -> object:
        """Return rank 0's `value` on every process."""
        if self.world == 1:
            return value
        return broadcast_object_list([value], from_process=0)[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all processes."""
        return tensor if self.world == 1 else self.accelerator.reduce(tensor, reduction="sum")

    def gather(self, value: object) -> list[object]:
        """Return every process's `value`, in the order of their ranks."""
        return [value] if self.world == 1 else gather_object([value])

    def any(self, wish: bool) -> bool:
        """Return on every process whether `wish` is true on at least one."""
        if self.world == 1:
            return wish
        return bool(self.sum(torch.tensor(float(wish), device=self.device)).item())

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each parameter's gradient by its sum over all processes. They may lie on several devices.

        What is exchanged at once is limited, so that there is never a second copy of a whole model's
        gradients. A process whose part of the batch was empty has no gradients and contributes zeros.
        """
        if self.world == 1:
            return
        for piece in _pieces([_gradient(p) for p in parameters if p.requires_grad], _PIECE):
            summed = self.sum(torch.cat(piece).to(self.device))
            torch._foreach_copy_(piece, list(summed.split([len(part) for part in piece])))


def _leave_gloo() -> None:
    """End the threads of torch's exchange between CPUs, which can abort a program that ends before them."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    """Return a parameter's gradient, contiguous; zeros if it has none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad = parameter.grad.contiguous()
    return parameter.grad


def _pieces(tensors: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Yield all numbers of contiguous tensors, as views (N,) of one dtype and device, `limit` at a time."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.view(-1))
    for flats in kinds.values():
        piece, room = [], limit
        for flat in flats:
            while len(flat) > room:
                yield [*piece, flat[:room]]
                flat, piece, room = flat[room:], [], limit
            piece.append(flat)
            room -= len(flat)
        yield piece


def run_seed(requested: int | None, processes: Processes) -> int:
    """Return the run's seed: the requested one, or a random one that all processes share."""
    seed = secrets.randbelow(2**31) if requested is None else requested
    return int(processes.agree(seed))  # type: ignore[call-overload]


def _check_gpus(device: torch.device) -> None:
    """Raise ConfigError if this computer has fewer GPUs than processes were started on it.

    Batch systems may show each process only the GPU that is its own; torchrun and accelerate show all to all.
    """
    place = int(os.environ.get("LOCAL_RANK", 0))
    shown_all = "TORCHELASTIC_RUN_ID" in os.environ
    if device.type == "cuda" and shown_all and place >= torch.cuda.device_count():
        raise ConfigError(
            f"process {place + 1} of this computer needs a GPU of its own, and there are "
            f"{torch.cuda.device_count()}: start as many processes as there are GPUs (--num_processes)."
        )


def _sharding() -> Sharding | None:
    """Read what `accelerate launch --use_fsdp`, or its configuration file, says.

    Raises:
        ConfigError: it asks for something that is done in another way here.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("FSDP is used in its second version: give accelerate `--fsdp_version 2`.")
    plugin = FullyShardedDataParallelPlugin()
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise ConfigError(
            "fsdp_offload_params is not used: leave it out. To keep weights in the computer's memory, start "
            "without FSDP and with --blocks_to_swap."
        )
    if plugin.activation_checkpointing:
        raise ConfigError("fsdp_activation_checkpointing is not used: give --gradient_checkpointing instead.")
    return Sharding(reshard_after_forward=plugin.reshard_after_forward)
