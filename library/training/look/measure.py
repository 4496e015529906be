"""--plan_memory: a real step in every way, on the device at hand, beside what was foretold of it."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from library.core.device import empty_cache
from library.core.errors import ConfigError
from library.core.files import write_text
from library.nn.running.runner import MODES
from library.options.budget import AUTO
from library.options.swap import SwapOptions
from library.options.train import TrainOptions
from library.training.context import RunContext
from library.training.guards import is_out_of_memory
from library.training.look.budget import allowed_bytes, precisions_for
from library.training.look.memory_estimate import Manner, MemoryEstimate, quant_flags, shown
from library.training.look.meter import Meter, Speeds
from library.training.look.planner import Calibration, make_plan
from library.training.look.simulate import Simulation
from library.training.look.texts import longest_text
from library.training.optim.optimizer import set_learning_rates
from library.training.trainee.learner import Learner

_KINDS = ("cuda", "cpu")


@dataclass(frozen=True)
class Measured:
    """A step that was made: bytes of weights and of what it took itself, as foretold and as found.

    seconds: of the second step; the first one pays for what is made once. found: 0 if it did not fit.
    """

    manner: Manner
    swapped: int
    foretold: int
    found: int
    seconds: float

    def line(self) -> str:
        """Return a row of the table."""
        name = f"{self.manner.quant or 'as given':<10}{self.manner.mode:<15}{self.swapped:>8}"
        if not self.found:
            return f"{name}{shown(self.foretold):>12}  does not fit"
        ratio = self.foretold / self.found
        return f"{name}{shown(self.foretold):>12}{shown(self.found):>12}{ratio:>8.3f}{self.seconds:>9.3f}"


def measure(context: RunContext) -> Path:
    """Make a step of each kind; print the table, and with --vram_budget the choice. Returns its file."""
    options, device = context.options, context.device
    if context.processes.world > 1:
        raise ConfigError("--plan_memory measures on one device: start it without accelerate launch.")
    if device.type not in _KINDS:
        raise ConfigError(f"--plan_memory can measure on a CUDA GPU or on the CPU, not on '{device.type}'.")
    allowed = None if options.budget.vram_budget is None else _allowed(context)
    speeds = Speeds()
    tokens = longest_text(context.trainer, context.prepared.manifest)
    estimate = MemoryEstimate(context.trainer, context, tokens=tokens, kind=device.type, speeds=speeds)
    print(f"a step on {len(estimate.work.sizes)} picture(s) of {estimate.work.sizes[0]}, on {device}")
    print(
        f"{'precision':<10}{'checkpoints':<15}{'swapped':>8}{'foretold':>12}{'found':>12}{'ratio':>8}{'s':>9}"
    )
    rows = []
    for row in _steps(context, estimate):
        print(row.line(), flush=True)
        rows.append(row)
    found = [row for row in rows if row.found]
    if found:
        print(f"foretold / found: {median(row.foretold / row.found for row in found):.3f} in the middle")
    path = options.saving.output_dir / "memory_plan.json"
    write_text(path, json.dumps([_as_json(row) for row in rows], indent=1))
    print(f"figures: {path}")
    if allowed is not None:
        _print_choice(context, estimate, rows, allowed)
    return path


def _steps(context: RunContext, estimate: MemoryEstimate) -> Iterator[Measured]:
    """Make two steps of each kind: every mode, then with blocks swapped, half of them unless the options say
    how many, then in every other precision that may be chosen; the latter two where they can be."""
    given, swap = context.options.quant.transformer, context.options.swap
    if not swap.count:
        swap = replace(swap, blocks_to_swap=estimate.block_count // 2)
    yield from _steps_of(context, estimate, given, SwapOptions(), MODES)
    if estimate.no_swap_because is None:
        yield from _steps_of(context, estimate, given, swap, ("none", "full"))
    others = precisions_for(context, estimate) if given is None else ()
    for quant in others:
        if quant is not None:
            yield from _steps_of(context, estimate, quant, SwapOptions(), ("none", "full"))


def _steps_of(
    context: RunContext, estimate: MemoryEstimate, quant: str | None, swap: SwapOptions, modes: Sequence[str]
) -> Iterator[Measured]:
    options: TrainOptions = replace(
        context.options, swap=swap, quant=replace(context.options.quant, **quant_flags(quant))
    )
    context = replace(context, trainer=context.trainer.with_options(options))
    for mode in modes:
        manner = Manner(quant, mode)
        foretold = sum(estimate.bytes_of_steps(manner, swap).values())
        if context.device.type == "cpu":  # where the device's memory is the computer's
            foretold += sum(estimate.bytes_in_computer_of_steps(manner, swap).values())
        try:
            found, seconds = _measured_steps(context, estimate, mode)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            found, seconds = 0, 0.0
        gc.collect()
        empty_cache(context.device)
        yield Measured(manner, swap.count, foretold, found, seconds)


def _measured_steps(context: RunContext, estimate: MemoryEstimate, mode: str) -> tuple[int, float]:
    """Return the most bytes of tensors that two steps have at once, and the seconds of one."""
    device = context.device
    if device.type == "cuda":
        _multiply_once(device)
        before = torch.cuda.memory_allocated(device)
        with closing(RealSteps(context, estimate, mode)) as rehearsed:
            torch.cuda.reset_peak_memory_stats(device)
            rehearsed.step()
            seconds = rehearsed.timed_step()
            return torch.cuda.max_memory_allocated(device) - before, seconds
    meter = Meter((device.type,))
    with meter:
        rehearsed = RealSteps(context, estimate, mode)
    with closing(rehearsed):
        with meter:
            meter.add(rehearsed.weights())  # those that are mapped into memory, too
            meter.take_peak()
            rehearsed.step()
            rehearsed.step()  # with all that the first one made
        return meter.peak, rehearsed.timed_step()


def _multiply_once(device: torch.device) -> None:
    """Let cuBLAS make what it keeps from its first product on, in this thread and in autograd's: tens of MiB
    that are no tensor's. The plan has them in its overhead, and beside a small model they would count."""
    x = torch.zeros(64, 64, device=device, requires_grad=True)
    (x @ x).sum().backward()


class RealSteps:
    """A model and what is trained, to make real steps."""

    def __init__(self, context: RunContext, estimate: MemoryEstimate, mode: str) -> None:
        trainer = context.trainer
        model = trainer.load_transformer(context.device, context.dtype)
        trainee = trainer.trainee_kind.make(
            context.options,
            model,
            lambda: trainer.load_text_encoders(context.device, context.dtype),
            seed=context.seed,
            device=context.device,
            started=False,
        )
        model.runner.keep(mode)
        self._context = context
        self._simulation = Simulation(trainer, model, trainee, context.device, context.device.type)
        self._work = estimate.work
        self._batches = min(2, context.options.training.gradient_accumulation_steps)  # more take no more
        self._learner: Learner | None = None  # what it learns with, made for the first step

    def weights(self) -> Iterator[torch.Tensor]:
        """Yield the weights of the model, and those of a network."""
        for module in (self._simulation.model, self._simulation.trainee):
            yield from (*module.parameters(), *module.buffers())

    def step(self) -> None:
        """Make a step, with its update."""
        kind, simulation = self._context.trainer.trainee_kind, self._simulation
        learner = self._learner = self._learner or kind.learner(simulation.trainee, self._context)
        set_learning_rates(learner.optimizer, lambda step, peaks: peaks, 0)
        for _ in range(self._batches):
            simulation.backward(self._work)
        learner.gradients.collect(self._context.processes)
        learner.gradients.norm()
        if not learner.gradients.moves_weights:
            learner.optimizer.step()
        learner.gradients.clear()

    def close(self) -> None:
        """Let torch forget the weights when this is forgotten."""
        if self._learner is not None:
            self._learner.gradients.close()

    def timed_step(self) -> float:
        """Return the seconds that a step takes."""
        self._wait()
        start = time.perf_counter()
        self.step()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._simulation.device.type == "cuda":
            torch.cuda.synchronize(self._simulation.device)


def _allowed(context: RunContext) -> int:
    budget = context.options.budget
    given = None if budget.vram_budget == AUTO else budget.bytes_allowed
    return allowed_bytes(budget.vram_budget, given, context.device)


def _print_choice(context: RunContext, estimate: MemoryEstimate, rows: list[Measured], allowed: int) -> None:
    """Choose by what was found: foretold memory and time are scaled to it."""
    plain = [row for row in rows if row.found and not row.swapped]
    calibration = Calibration(
        memory={row.manner: row.found / row.foretold for row in plain},
        seconds={row.manner: row.seconds for row in plain},
    )
    precisions = precisions_for(context, estimate)
    plan = make_plan(estimate, context.options, allowed, Speeds(), precisions, calibration)
    print("\n".join(plan.lines()))


def _as_json(row: Measured) -> dict[str, object]:
    return {
        "base_quant": row.manner.quant,
        "mode": row.manner.mode,
        "blocks_swapped": row.swapped,
        "foretold_bytes": row.foretold,
        "found_bytes": row.found or None,
        "seconds": row.seconds or None,
    }
