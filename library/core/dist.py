"""The processes of a run: who am I, and what do we agree on. The only file that imports accelerate."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those that `accelerate launch` started. `rank` 0 writes files and speaks."""

    accelerator: Accelerator

    @classmethod
    def start(cls, timeout_minutes: int | None = None) -> Processes:
        """Join the process group.

        Precision is handled by our own models, so accelerate gets none to apply.
        """
        handlers = []
        if timeout_minutes is not None:
            handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes)))
        return cls(Accelerator(mixed_precision="no", kwargs_handlers=handlers))

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

    def any(self, wish: bool) -> bool:
        """Return on every process whether `wish` is true on at least one."""
        if self.world == 1:
            return wish
        return bool(self.sum(torch.tensor(float(wish), device=self.device)).item())

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each parameter's gradient by its sum over all processes, in one exchange a dtype.

        A process whose part of the batch was empty has no gradients and contributes zeros.
        """
        if self.world == 1:
            return
        trained = [p for p in parameters if p.requires_grad]
        for dtype in dict.fromkeys(p.dtype for p in trained):
            group = [p for p in trained if p.dtype == dtype]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in group])
            summed = self.sum(flat)
            for parameter, part in zip(group, summed.split([p.numel() for p in group]), strict=True):
                parameter.grad = part.view_as(parameter).clone()


def run_seed(requested: int | None, processes: Processes) -> int:
    """Return the run's seed: the requested one, or a random one that all processes share."""
    seed = secrets.randbelow(2**31) if requested is None else requested
    return int(processes.agree(seed))  # type: ignore[call-overload]
