"""One optimizer step: losses of its micro-batches, gradients, the check that they are finite, the update."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from library.core.dist import Processes
from library.core.errors import NonFiniteError
from library.core.log import logger
from library.core.seeds import derive
from library.data.batch import Batch
from library.training.gradients import Gradients

_TINY = 1e-6  # as torch's own clipping has it
MAX_SKIPPED = 25  # steps in a row without an update (fp16 overflow, --on_nan skip) before a run is given up

_ADVICE = "Lower --learning_rate, use bf16 instead of fp16, or leave such steps out with --on_nan skip."

_log = logger("update")


@dataclass(frozen=True)
class Share:
    """One process's part of a micro-batch; `total` counts the pictures over all processes."""

    batch: Batch
    total: int


@dataclass(frozen=True)
class StepResult:
    """What a step did. `loss` is the mean over all its pictures and processes, before the update; what the
    gauges found is of the same moment.
    """

    loss: float
    grad_norm: float
    updated: bool
    gauged: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class UpdateSettings:
    """What the user decides of a step.

    seed: of dropout. max_grad_norm: the gradient is scaled down to it; 0 for never. scale_gradients: losses
    are scaled up for backward, as fp16 needs it. on_nan: "stop" or "skip".
    """

    seed: int
    max_grad_norm: float
    scale_gradients: bool = False
    on_nan: str = "stop"


class PartlyUpdatedError(NonFiniteError):
    """A gradient is NaN or infinite, and weights have moved in this step."""


class Gauge(Protocol):
    """Measures each step. The numbers stay on the device until they are read together with the loss.

    `shared`: the numbers of all processes are added up.
    """

    shared: bool

    def measure(self, step: int) -> Tensor:
        """Return the numbers (N,) of a step, counted from 0, fp32; nothing waits for the device.

        A gauge that is not `shared` may have none in some steps.
        """

    def named(self, numbers: Sequence[float]) -> dict[str, float]:
        """Return what these numbers are called in the log."""


class Losses(Protocol):
    """What is minimised."""

    def training_losses(self, batch: Batch) -> Tensor:
        """Return the loss of each picture of a batch (B,)."""

    def sigmas(self, batch: Batch) -> Tensor:
        """Return the sigma at which each picture of a batch is trained (B,)."""


class Updater:
    """Turns the micro-batches of a step into one update of the trained parameters.

    Every micro-batch counts the same, whatever its number of pictures, and so does every picture within one:
    the gradient of several processes is that of one process with the whole batch.
    """

    def __init__(
        self,
        objective: Losses,
        gradients: Gradients,
        optimizer: torch.optim.Optimizer,
        processes: Processes,
        settings: UpdateSettings,
        *,
        idle: Callable[[int, int], None] = lambda step, micro: None,
        gauges: Sequence[Gauge] = (),
    ) -> None:
        """`idle` is called for a micro-batch, of a step, of which this process has no picture."""
        self._objective = objective
        self._gradients = gradients
        self._optimizer = optimizer
        self._processes = processes
        self._settings = settings
        self._scaler = torch.amp.GradScaler(processes.device.type, enabled=settings.scale_gradients)
        # The scale comes with the first use, and this process may have no picture in its first steps.
        self._scaler.scale(torch.zeros((), device=processes.device))
        self._idle = idle
        self._gauges = sorted(gauges, key=lambda gauge: not gauge.shared)
        self._skipped = 0  # steps in a row without an update
        self._losses: list[Tensor] = []  # of each picture of the step, by micro-batch
        self._learns = False  # whether anything trained had a part in the step's losses

    def export_state(self) -> dict[str, object]:
        """Return what must be remembered between steps, as JSON keeps it."""
        return {"scaler": self._scaler.state_dict(), "skipped": self._skipped}

    def import_state(self, state: dict[str, object]) -> None:
        """Take over what `export_state` of another run returned."""
        if self._scaler.is_enabled() and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        self._skipped = int(state["skipped"])

    def step(
        self, step: int, shares: Sequence[Share], *, between: Callable[[], None] | None = None
    ) -> StepResult:
        """Run optimizer step number `step` (from 0). The parameters do not move on a loss or gradient that is
        NaN or infinite: an fp16 overflow and, with on_nan "skip", any such step is left out.

        Args:
            between: called between two micro-batches; what it raises breaks the step off.

        Raises:
            NonFiniteError: loss or gradient is NaN or infinite; the parameters are as they were.
            PartlyUpdatedError: so is a gradient of parameters that move during backward; others have moved.
        """
        loss = self._backward(step, shares, between)
        self._gradients.collect(self._processes)
        if self._learns:
            self._scaler.unscale_(self._optimizer)
        loss_value, norm_value, gauged = self._read(step, loss, self._gradients.norm())
        updated = self._check(step, shares, loss_value, norm_value)
        if updated and self._learns and not self._gradients.moves_weights:
            self._clip(norm_value)
            self._optimizer.step()  # not the scaler's `step`, which would wait to learn what the norm told
        if self._learns:
            self._scaler.update()
        self._gradients.clear()
        return StepResult(loss_value, norm_value, updated, gauged)

    def _read(self, step: int, loss: Tensor, norm: Tensor) -> tuple[float, float, dict[str, float]]:
        """Bring the numbers of the step over from the device: the only time that a step waits for it."""
        measured = [gauge.measure(step) for gauge in self._gauges]
        shared = sum(gauge.shared for gauge in self._gauges)
        summed = self._processes.sum(torch.cat([loss.view(1), *measured[:shared]]))
        loss_value, *numbers = torch.cat([summed, *measured[shared:], norm.view(1)]).tolist()
        norm_value, gauged = numbers.pop(), {}
        for gauge, tensor in zip(self._gauges, measured, strict=True):
            gauged |= gauge.named(numbers[: len(tensor)])
            numbers = numbers[len(tensor) :]
        return loss_value, norm_value, gauged

    def _backward(self, step: int, shares: Sequence[Share], between: Callable[[], None] | None) -> Tensor:
        """Add up gradients and return this process's part of the mean loss."""
        parts: list[Tensor] = []
        self._losses = []
        self._learns = self._processes.world > 1  # the others' gradients are summed in any case
        for micro, share in enumerate(shares):
            if micro > 0 and between is not None:
                between()
            if not share.batch.draws:
                self._idle(step, micro)
                continue  # this process has no picture in the last batch of a bucket
            # Dropout in the network draws from the global generator: seeded here, it has no history either.
            seed = derive(self._settings.seed, "dropout", step, micro, self._processes.rank)
            _seed_globally(seed, self._processes.device)
            losses_B = self._objective.training_losses(share.batch)
            self._losses.append(losses_B.detach())
            loss = losses_B.sum() / (share.total * len(shares))
            parts.append(loss.detach())
            if self._gradients.moves_weights and not math.isfinite(loss.item()):
                break  # `_check` ends the step, before anything moved
            if loss.requires_grad:  # module dropout can leave out every layer
                self._learns = True
                self._scaler.scale(loss).backward()
        return (
            functools.reduce(Tensor.add, parts) if parts else torch.zeros((), device=self._processes.device)
        )

    def _clip(self, norm: float) -> None:
        """Scale the gradient, which has this norm, down to --max_grad_norm unless that is 0."""
        limit = self._settings.max_grad_norm
        if 0 < limit < norm + _TINY:
            self._gradients.scale(limit / (norm + _TINY))

    def _check(self, step: int, shares: Sequence[Share], loss: float, norm: float) -> bool:
        """Return whether the update will happen, or has where gradients move weights; raise, before weights
        move if they still can be kept from it, on anything that is not finite.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self._skipped = 0
            return True
        self._skipped += 1
        overflow = math.isfinite(loss) and self._scaler.is_enabled()  # of fp16: the scaler lowers its scale
        if overflow and self._skipped <= MAX_SKIPPED:
            return False
        moved = math.isfinite(loss) and self._gradients.moves_weights
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
        found = f"Step {step + 1}: the {what}. {self._suspects(shares)}"
        if self._settings.on_nan == "skip" and self._skipped <= MAX_SKIPPED:
            left_out = "Gradients that are not finite are" if moved else "This step is"
            _log.warning("%s %s left out (--on_nan skip).", found, left_out)
            return moved
        often = f" for the {self._skipped}th time in a row" if self._skipped > 1 else ""
        if moved:
            raise PartlyUpdatedError(
                f"{found} So the run stops{often}. Other weights of this step may already have moved: go on "
                f"from the last state with --resume latest. {_ADVICE}"
            )
        raise NonFiniteError(f"{found} So the run stops{often}, before any weight is touched. {_ADVICE}")

    def _suspects(self, shares: Sequence[Share]) -> str:
        """Name this process's pictures whose loss is not finite, or all of the step if none is at fault."""
        batches = [share.batch for share in shares if share.batch.draws]
        if not batches:
            return "The pictures of this process are not at fault: it had none in this step."
        names = [name for batch in batches for name in batch.names]
        sigmas = torch.cat([self._objective.sigmas(batch) for batch in batches]).tolist()
        finite = torch.cat(self._losses).isfinite().tolist()
        told = [f"{name} (sigma {sigma:.3f})" for name, sigma in zip(names, sigmas, strict=True)]
        bad = [text for text, good in zip(told, finite, strict=True) if not good]
        return f"It comes from {', '.join(bad)}." if bad else f"Pictures of this step: {', '.join(told)}."


def _seed_globally(seed: int, device: torch.device) -> None:
    """Seed the generators that modules draw from. torch.manual_seed asks after every kind of device first."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
