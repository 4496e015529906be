"""--vram_budget: the fastest way to make a step that fits into an amount of memory.

For each precision of the frozen model and each way to keep less for backward, memory and time come from a
step on the meta device (`simulate`); block swap takes weights off the device, as few as are needed. So a
choice costs

    time = max(forward, copies) + max(backward, copies) + 2 * SEEN * copies + update

with copies = bytes of the swapped blocks / speed of the link, which run beside the computation. The update
of trained weights is made where they lie, for swapped blocks by the computer's processor while the device
waits: so of a whole model that is trained, as few as can be are swapped, and none where the optimizer has no
step for the processor.

Precision is another matter: everything else gives the same numbers bit for bit. So a quantised model is
weighed as if a step took longer (`RELUCTANCE`), and is chosen where nothing else fits, or all else is that
much slower. How much longer is a judgement, which nothing was measured for: errors of the weights of 0.7 %
(int8) and 9 % (nf4) are taken to be worth half a step, and one and a half. Whoever judges otherwise gives
--base_quant, or copies the modes and the swap of another line of the table. A model whose own weights are
trained keeps its precision; nor is --fused_backward_pass ever chosen, which limits gradients in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING

import torch

from library.core.errors import ConfigError, ResourceError
from library.core.log import logger
from library.nn.runner import MODES
from library.options.budget import AUTO
from library.options.compute import CHECKPOINTS, ComputeOptions
from library.options.swap import SwapOptions
from library.options.train import TrainOptions
from library.training.guards import upkeep_advice
from library.training.look.holdings import Parts
from library.training.look.memory_estimate import (
    DRAWING,
    LATENT_PASS,
    TEXT_PASS,
    Manner,
    MemoryEstimate,
    free_memory,
    quant_flags,
    shown,
    summed,
)
from library.training.look.meter import Speeds

if TYPE_CHECKING:
    from library.training.context import RunContext

OVERHEAD = 600 * 2**20  # a driver's own memory and the libraries' work space, which no tensor has
LATER = 256 * 2**20  # kernels and work space that a running program still loads
SLACK = 1.05  # what the allocator holds, for each byte of tensors
RELUCTANCE = {None: 1.0, "fp8": 1.5, "int8": 1.5, "int4": 2.5, "nf4": 2.5}
SEEN = 0.1  # share of the copies' time that the computation feels although they run beside it
PRECISIONS = (None, "int8", "nf4")  # tried where none is given; int8 is nearer to the original than fp8

_PAGEABLE = 0.4  # share of the link's speed that copies from ordinary memory reach
_MIXED = (("feed_forward", 2), ("outputs", 2), ("full", 2))  # half of the blocks; all lies in between

_LESS_FOR = {  # a phase beside training
    TEXT_PASS: "less with --text_encoder_quant int8 or a smaller --text_encoder_batch_size; nothing if all "
    "texts are cached already",
    LATENT_PASS: "less with a smaller --vae_batch_size; nothing if all latents are cached already",
    DRAWING: "less with smaller sample pictures or a smaller --sample_batch_size",
}

_log = logger("budget")


@dataclass(frozen=True)
class Calibration:
    """What --plan_memory found of the steps that were made. memory: bytes for each one foretold."""

    memory: Mapping[Manner, float] = field(default_factory=dict)
    seconds: Mapping[Manner, float] = field(default_factory=dict)

    def excess(self, manner: Manner) -> float:
        """Return by what foretold bytes are to be multiplied; for what was not made, by the most of all."""
        return self.memory.get(manner) or max(self.memory.values(), default=1.0)

    def pace(self, manner: Manner, estimate: MemoryEstimate) -> float:
        """Return by what the foretold seconds of a step are to be multiplied."""
        ratios = {}
        for made, seconds in self.seconds.items():
            step = estimate.step(made)
            update = estimate.update_seconds(made.quant, SwapOptions())
            ratios[made] = seconds / (step.forward + step.backward + update)
        return ratios.get(manner) or (median(ratios.values()) if ratios else 1.0)


_UNCALIBRATED = Calibration()


@dataclass(frozen=True)
class Choice:
    """A way to make steps. memory: bytes of tensors while training. seconds: of a step.

    parts: of the memory. elsewhere: what is in the computer's memory for swapped blocks.
    """

    manner: Manner
    swap: SwapOptions
    parts: Parts
    elsewhere: Parts
    memory: int
    seconds: float

    @property
    def cost(self) -> float:
        """What is to be smallest; of two that cost the same, the one that takes less."""
        return self.seconds * RELUCTANCE[self.manner.quant]

    def flags(self) -> str:
        """Return the choice as flags to copy."""
        words = ["--gradient_checkpointing"] if self.manner.mode in CHECKPOINTS else []
        words.append(f"--checkpoint_mode {self.manner.mode}")
        if self.manner.every > 1:
            words.append(f"--checkpoint_every_n_blocks {self.manner.every}")
        if self.swap.count:
            words.append(f"--blocks_to_swap {self.swap.count}")
            if self.swap.use_pinned_memory_for_block_swap:
                words.append("--use_pinned_memory_for_block_swap")
            if self.swap.block_swap_ring_size != SwapOptions().block_swap_ring_size:
                words.append(f"--block_swap_ring_size {self.swap.block_swap_ring_size}")
        if self.manner.quant is not None:
            words.append(f"--base_quant {self.manner.quant}")
        return " ".join(words)

    def apply_to(self, options: TrainOptions) -> TrainOptions:
        """Return options that ask for this."""
        mode = self.manner.mode
        compute = replace(
            options.compute,
            gradient_checkpointing=options.compute.gradient_checkpointing or mode in CHECKPOINTS,
            checkpoint_mode=mode,
            checkpoint_every_n_blocks=self.manner.every,
        )
        quant = options.quant
        if quant.transformer != self.manner.quant:
            quant = replace(quant, **quant_flags(self.manner.quant))
        return replace(options, compute=compute, swap=self.swap, quant=quant)


@dataclass(frozen=True)
class MemoryPlan:
    """What tensors may take, and what was looked at: a choice for each manner, the cheapest first."""

    allowed: int
    choices: tuple[Choice, ...]
    warnings: tuple[str, ...] = ()

    @property
    def chosen(self) -> Choice:
        """The cheapest that fits."""
        return next(choice for choice in self.choices if choice.memory <= self.allowed)

    def lines(self) -> list[str]:
        """Return the table, the choice, and what it takes."""
        fastest = min(choice.seconds for choice in self.choices)
        rows = [f"{'precision':<10}{'checkpoints':<20}{'swapped':>8}{'memory':>12}{'time':>7}"]
        for choice in self.choices:
            manner = choice.manner
            mode = f"{manner.mode}, every {manner.every}" if manner.every > 1 else manner.mode
            end = "  <- chosen" if choice is self.chosen else ""
            end = end or ("" if choice.memory <= self.allowed else "  too much")
            rows.append(
                f"{manner.quant or 'as given':<10}{mode:<20}{choice.swap.count:>8}{shown(choice.memory):>12}"
                f"{choice.seconds / fastest:>7.2f}{end}"
            )
        parts = ", ".join(f"{name} {shown(size)}" for name, size in self.chosen.parts.items())
        return [
            f"tensors may take {shown(self.allowed)}",
            *rows,
            f"of this, {shown(self.chosen.memory)}: {parts}",
            *(
                [f"in the computer's memory: {summed(self.chosen.elsewhere)}"]
                if self.chosen.elsewhere
                else []
            ),
            f"flags: {self.chosen.flags()}",
            *self.warnings,
        ]


def allowed_bytes(budget: str, given: int | None, device: torch.device) -> int:
    """Return how much tensors may take. `given`: the amount, unless the budget is "auto".

    Raises:
        ConfigError: it asks for what is free on a device that does not tell.
        ResourceError: nothing is left for tensors.
    """
    if budget != AUTO:
        assert given is not None
        return _rest(budget, given, OVERHEAD)
    if device.type != "cuda":
        raise ConfigError(
            f"--vram_budget auto asks a CUDA GPU how much of its memory is free, and this run is on the "
            f"{device.type}; give an amount, such as 12GB, to plan for a GPU of that size."
        )
    free, _ = torch.cuda.mem_get_info(device)
    return _rest(f"{budget} ({shown(free)})", free, LATER)


def _rest(budget: str, size: int, reserve: int) -> int:
    if size <= reserve:
        raise ResourceError(
            f"--vram_budget {budget} leaves nothing for tensors: {shown(reserve)} are kept back for the "
            "driver and the libraries. Give it more."
        )
    return round((size - reserve) / SLACK)


def precisions_for(context: RunContext, estimate: MemoryEstimate) -> tuple[str | None, ...]:
    """Return the schemes of `library.nn.quant` that may be chosen for a run, unless it is given one.

    A model whose own weights are trained, or that is quantised in its file, keeps its precision, and a
    resumed run keeps what it had.
    """
    prepared = context.prepared
    if not context.options.trainee.freezes_dit or estimate.comes_quantised:
        return (None,)
    return PRECISIONS if prepared.resumed is None else (prepared.settings["base_quant"],)


def make_plan(
    estimate: MemoryEstimate,
    options: TrainOptions,
    allowed: int,
    speeds: Speeds,
    precisions: Sequence[str | None],
    calibration: Calibration = _UNCALIBRATED,
) -> MemoryPlan:
    """Choose. Whatever `options` ask for is kept.

    Args:
        allowed: bytes for tensors. speeds: those of the estimate.
        precisions: to choose from, unless `options` ask for one; see `precisions_for`.

    Raises:
        ResourceError: nothing fits.
    """

    def swapping_enough(manner: Manner) -> Choice:
        return _with_swap(estimate, manner, options.swap, allowed, speeds, calibration)

    found: list[Choice] = []
    given = options.quant.transformer
    for precision in precisions if given is None else (given,):
        if _fits(found, allowed) and _best(found, allowed) < RELUCTANCE[precision] * _fastest(found):
            break  # it would not be chosen even if it were as fast as the fastest
        for mode in _modes(options):
            found.append(swapping_enough(Manner(precision, *mode)))
        found += _mixtures(found, precision, allowed, options.compute, swapping_enough)
    if not _fits(found, allowed):
        smallest = min(found, key=lambda choice: choice.memory)
        reason = _unswapped(estimate, options.swap)
        raise ResourceError(
            f"--vram_budget {options.budget.vram_budget} leaves {shown(allowed)} for tensors, and training "
            f"takes at least {summed(smallest.parts)}, with {smallest.flags()}. What helps: "
            f"{_way_out(options)}, or a higher budget.{f' {reason}' if reason else ''}"
        )
    found.sort(key=lambda choice: (choice.cost, choice.memory))
    return MemoryPlan(allowed, tuple(found))


def planned(context: RunContext) -> RunContext:
    """Return the run with what --vram_budget chooses; as it is, if that is not given. Tells the choice."""
    options, device = context.options, context.device
    if options.budget.vram_budget is None:
        return context
    if context.processes.sharding is not None:
        raise ConfigError("--vram_budget does not plan for FSDP: leave it out, or start without --use_fsdp.")
    budget = options.budget
    given = None if budget.vram_budget == AUTO else budget.bytes_allowed
    mine = allowed_bytes(budget.vram_budget, given, device)
    allowed = min(context.processes.gather(mine))  # all processes run alike
    speeds = Speeds()
    estimate = MemoryEstimate(context.trainer, context, speeds=speeds)
    plan = make_plan(estimate, options, allowed, speeds, precisions_for(context, estimate))
    plan = replace(plan, warnings=tuple(_warnings(estimate, plan, options, device)))
    _log.info("--vram_budget %s\n%s", budget.vram_budget, "\n".join(f"  {line}" for line in plan.lines()))
    chosen = context.processes.agree(plan.chosen)
    assert isinstance(chosen, Choice)
    return with_options(context, chosen.apply_to(options))


def with_options(context: RunContext, options: TrainOptions) -> RunContext:
    """Return a run that goes by other options of precision, swap and checkpoints."""
    prepared = context.prepared
    settings = {**prepared.settings, "base_quant": options.quant.transformer}
    now, before = options.adjustments(), context.options.adjustments()
    told = tuple(sentence for sentence in prepared.adjustments if sentence in now or sentence not in before)
    return replace(
        context,
        trainer=context.trainer.with_options(options),
        prepared=replace(prepared, settings=settings, adjustments=told),
    )


def _way_out(options: TrainOptions) -> str:
    """Return what the user can do that is never chosen for him."""
    caching = options.caching
    caches = {
        "--cache_latents_to_disk": caching.latents,
        "--cache_text_encoder_outputs_to_disk": caching.texts or options.trainee.trains_text_encoder,
    }
    return ", ".join(
        [
            *(advice.what for advice in upkeep_advice(options, swapping=False)),
            "a lower resolution or batch_size",
            *(flag for flag, there in caches.items() if not there),
        ]
    )


def _modes(options: TrainOptions) -> list[tuple[str, int]]:
    compute = options.compute
    every = compute.checkpoint_every_n_blocks
    if compute.checkpoint_mode is not None:
        return [(compute.checkpoint_mode, every)]
    ruled_out = {"none"} if compute.gradient_checkpointing else set()
    if compute.cpu_offload_checkpointing:
        ruled_out |= {"feed_forward", "outputs", "full"}
        ruled_out |= {"selective"} if compute.gradient_checkpointing else set()
    if compute.compiles:
        ruled_out |= {"selective", "feed_forward", "outputs"}  # there the compiler chooses
    return [(mode, every) for mode in MODES if mode not in ruled_out]


def _mixtures(
    found: Sequence[Choice],
    precision: str | None,
    allowed: int,
    compute: ComputeOptions,
    swapping_enough: Callable[[Manner], Choice],
) -> Iterator[Choice]:
    """Yield choices that checkpoint half of the blocks, where that could be better than what was found."""
    of_mode = {choice.manner.mode: choice for choice in found if choice.manner.quant == precision}
    for mode, every in _MIXED:
        between = compute.keeps_between(mode)
        if mode not in of_mode or between not in of_mode or compute.checkpoint_every_n_blocks > 1:
            continue
        if of_mode[between].memory <= allowed:
            continue
        hoped = (of_mode[between].seconds + of_mode[mode].seconds) / 2 * RELUCTANCE[precision]
        if not _fits(found, allowed) or hoped < _best(found, allowed):
            yield swapping_enough(Manner(precision, mode, every))


def _with_swap(
    estimate: MemoryEstimate,
    manner: Manner,
    given: SwapOptions,
    allowed: int,
    speeds: Speeds,
    calibration: Calibration,
) -> Choice:
    """Return a way of making steps with as few blocks swapped as make it fit, or with all of them."""
    most = 0 if _unswapped(estimate, given) else estimate.block_count
    counts = range(most + 1) if given.blocks_to_swap is None else (given.count,)
    swap = given
    for count in counts:
        swap = replace(given, blocks_to_swap=count or given.blocks_to_swap)
        parts = estimate.training(manner, swap)
        memory = round(sum(parts.values()) * calibration.excess(manner))
        if memory <= allowed:
            break
    copied, elsewhere = estimate.swapped_bytes(manner.quant, swap), estimate.in_computer(manner, swap)
    if swap.count and given.blocks_to_swap is None:
        pinned = given.use_pinned_memory_for_block_swap or sum(elsewhere.values()) < free_memory() / 2
        swap = replace(swap, use_pinned_memory_for_block_swap=pinned)
    rate = speeds.link * (1 if swap.use_pinned_memory_for_block_swap else _PAGEABLE)
    step, pace, copies = estimate.step(manner), calibration.pace(manner, estimate), copied / rate
    forward, backward = step.forward * pace, step.backward * pace
    if swap.block_swap_ring_size == 1:
        seconds = forward + backward + 2 * copies
    else:
        seconds = max(forward, copies) + max(backward, copies) + 2 * SEEN * copies
    seconds += estimate.update_seconds(manner.quant, swap) * pace
    return Choice(manner, swap, parts, elsewhere, memory, seconds)


def _unswapped(estimate: MemoryEstimate, given: SwapOptions) -> str | None:
    """Return why no block swap is chosen, unless that is not asked for, or nothing is in its way."""
    return estimate.no_swap_because if given.blocks_to_swap is None else None


def _warnings(
    estimate: MemoryEstimate, plan: MemoryPlan, options: TrainOptions, device: torch.device
) -> Iterator[str]:
    chosen = plan.chosen
    if reason := _unswapped(estimate, options.swap):
        yield reason
    if device.type != "cuda":
        yield f"this is a plan for a GPU: on '{device}' swapping blocks saves no memory"
    if (elsewhere := sum(chosen.elsewhere.values())) > (free := free_memory()):
        yield (f"swapped blocks take {shown(elsewhere)} of the computer's memory; {shown(free)} are free")
    for phase, parts in estimate.other_phases(chosen.manner, chosen.swap).items():
        if sum(parts.values()) > plan.allowed:
            yield f"{phase} may take more, {summed(parts)}: {_LESS_FOR[phase]}"


def _fits(found: Sequence[Choice], allowed: int) -> bool:
    return any(choice.memory <= allowed for choice in found)


def _fastest(found: Sequence[Choice]) -> float:
    return min(choice.seconds for choice in found)


def _best(found: Sequence[Choice], allowed: int) -> float:
    return min(choice.cost for choice in found if choice.memory <= allowed)
