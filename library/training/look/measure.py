"""--plan_memory: a real step in every way, on the device at hand, beside what was foretold of it."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from library.core.device import empty_cache
from library.core.errors import ConfigError
from library.core.files import write_text
from library.nn.block_swap import chosen_blocks, spared_bytes
from library.nn.runner import MODES
from library.options.budget import AUTO
from library.options.swap import SwapOptions
from library.options.train import TrainOptions
from library.training.context import RunContext
from library.training.look.memory_estimate import Manner, MemoryEstimate, quant_flags, shown
from library.training.look.meter import Speeds
from library.training.look.planner import Calibration, allowed_bytes, make_plan
from library.training.look.simulate import Simulation, weight_bytes
from networks.module import install_new_network

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
    speeds = Speeds()
    estimate = MemoryEstimate(context.trainer, context, kind=device.type, speeds=speeds)
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
    if options.budget.vram_budget is not None:
        _print_choice(context, estimate, rows)
    path = options.saving.output_dir / "memory_plan.json"
    write_text(path, json.dumps([_as_json(row) for row in rows], indent=1))
    print(f"figures: {path}")
    return path


def _steps(context: RunContext, estimate: MemoryEstimate) -> Iterator[Measured]:
    """Make two steps of each kind: every mode, then with half of the blocks swapped, then quantised."""
    given = context.options.quant.transformer
    half = SwapOptions(blocks_to_swap=estimate.blocks // 2)
    yield from _steps_of(context, estimate, given, SwapOptions(), MODES)
    yield from _steps_of(context, estimate, given, half, ("none", "full"))
    if given is None:
        yield from _steps_of(context, estimate, "int8", SwapOptions(), ("none", "full"))


def _steps_of(
    context: RunContext, estimate: MemoryEstimate, quant: str | None, swap: SwapOptions, modes: Sequence[str]
) -> Iterator[Measured]:
    options: TrainOptions = replace(
        context.options, swap=swap, quant=replace(context.options.quant, **quant_flags(quant))
    )
    for mode in modes:
        manner = Manner(quant, mode)
        foretold = estimate.weights(quant, swap) + estimate.step(manner).peak
        simulation = _loaded(context, options)
        simulation.model.runner.keep(mode)
        try:
            found, seconds = _two_steps(simulation, estimate, swap)
        except torch.OutOfMemoryError:
            found, seconds = 0, 0.0
        del simulation
        gc.collect()
        empty_cache(context.device)
        yield Measured(manner, swap.count, foretold, found, seconds)


def _loaded(context: RunContext, options: TrainOptions) -> Simulation:
    trainer = context.trainer.with_options(options)
    model = trainer.load_transformer(context.device, context.dtype)
    network = install_new_network(
        options.network,
        model,
        lambda: trainer.load_text_encoders(context.device, context.dtype),
        seed=context.seed,
        learning_rate=options.optimizer.learning_rate,
        device=context.device,
    )
    network.train()
    return Simulation(trainer, model, network, context.device, context.device.type)


def _two_steps(simulation: Simulation, estimate: MemoryEstimate, swap: SwapOptions) -> tuple[int, float]:
    """Return the bytes of weights and the most of the first step, and the seconds of the second."""
    device, model = simulation.device, simulation.model
    swapped = spared_bytes(chosen_blocks(model.runner.blocks, swap), 0)
    weights = weight_bytes(model) - swapped
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        simulation.step(estimate.work, metered=False)
        peak = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.synchronize(device)
    else:
        peak = simulation.step(estimate.work).peak
    start = time.perf_counter()
    simulation.step(estimate.work, metered=False)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return weights + peak, time.perf_counter() - start


def _print_choice(context: RunContext, estimate: MemoryEstimate, rows: list[Measured]) -> None:
    """Choose by what was found: foretold memory and time are scaled to it."""
    budget = context.options.budget
    given = None if budget.vram_budget == AUTO else budget.bytes_allowed
    allowed = allowed_bytes(budget.vram_budget, given, context.device)
    plain = [row for row in rows if row.found and not row.swapped]
    calibration = Calibration(
        memory=max((row.found / row.foretold for row in plain), default=1.0),
        seconds={row.manner: row.seconds for row in plain},
    )
    plan = make_plan(estimate, context.options, allowed, Speeds(), calibration)
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
