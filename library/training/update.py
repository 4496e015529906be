"""One optimizer step: losses of its micro-batches, gradients, the check that they are finite, the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.core.dist import Processes
from library.core.errors import NonFiniteError
from library.core.seeds import derive
from library.data.batch import Batch

MAX_OVERFLOWS = (
    25  # fp16 steps skipped in a row before the run is given up; the scaler halves the scale each time
)


@dataclass(frozen=True)
class Share:
    """One process's part of a micro-batch; `total` counts the pictures over all processes."""

    batch: Batch
    total: int


@dataclass(frozen=True)
class StepResult:
    """What a step did. `loss` is the mean over all its pictures and processes, before the update."""

    loss: float
    grad_norm: float
    updated: bool


class Updater:
    """Turns the micro-batches of a step into one update of the trained parameters.

    Every micro-batch counts the same, whatever its number of pictures, and so does every picture within one:
    the gradient of several processes is that of one process with the whole batch.
    """

    def __init__(
        self,
        losses: Callable[[Batch], Tensor],
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        processes: Processes,
        *,
        seed: int,
        max_grad_norm: float,
        scale_gradients: bool,
    ) -> None:
        self._losses = losses
        self._parameters = list(parameters)
        self._optimizer = optimizer
        self._processes = processes
        self._seed = seed
        self._max_grad_norm = max_grad_norm
        self._scaler = torch.amp.GradScaler(processes.device.type, enabled=scale_gradients)
        self._overflows = 0

    def step(self, step: int, shares: Sequence[Share]) -> StepResult:
        """Run optimizer step number `step` (from 0).

        Raises:
            NonFiniteError: loss or gradient is NaN or infinite; the parameters are as they were.
        """
        loss = self._backward(step, shares)
        self._processes.sum_gradients(self._parameters)
        self._scaler.unscale_(self._optimizer)
        norm = self._clip()
        loss_value, norm_value = torch.stack(
            [self._processes.sum(loss), norm]
        ).tolist()  # the step's one wait
        updated = self._check(step, shares, loss_value, norm_value)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(loss_value, norm_value, updated)

    def _backward(self, step: int, shares: Sequence[Share]) -> Tensor:
        """Add up gradients and return this process's part of the mean loss."""
        total = torch.zeros((), device=self._processes.device)
        for micro, share in enumerate(shares):
            if not share.batch.draws:
                continue  # this process has no picture in the last batch of a bucket
            # Dropout in the network draws from the global generator: seeded here, it has no history either.
            torch.manual_seed(derive(self._seed, "dropout", step, micro, self._processes.rank))
            loss = self._losses(share.batch).sum() / (share.total * len(shares))
            self._scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _clip(self) -> Tensor:
        """Return the gradient's norm; scale the gradient down to --max_grad_norm unless that is 0."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self._max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self._parameters, self._max_grad_norm, norm)
        return norm.to(self._processes.device)

    def _check(self, step: int, shares: Sequence[Share], loss: float, norm: float) -> bool:
        """Return whether the update will happen; raise before weights move on anything that is not finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            self._overflows = 0
            return True
        if math.isfinite(loss) and self._scaler.is_enabled() and self._overflows < MAX_OVERFLOWS:
            self._overflows += 1  # an fp16 overflow: the scaler skips the update and lowers its scale
            return False
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
        names = sorted({name for share in shares for name in share.batch.names})
        raise NonFiniteError(
            f"Step {step + 1}: the {what}, so the run stops before the network is touched. Pictures of this "
            f"step on this process: {', '.join(names)}. Lower --learning_rate, or use bf16 instead of fp16."
        )
