"""The fastest way to make a step that fits into an amount of memory.

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

from library.core.errors import ResourceError
from library.nn.running.runner import MODES
from library.options.compute import ComputeOptions
from library.options.swap import SwapOptions
from library.options.train import TrainOptions
from library.training.guards import upkeep_advice
from library.training.look.memory_estimate import Manner, MemoryEstimate, free_memory, shown, summed
from library.training.look.memory_plan import RELUCTANCE, Choice, MemoryPlan
from library.training.look.meter import Speeds

SEEN = 0.1  # share of the copies' time that the computation feels although they run beside it

_PAGEABLE = 0.4  # share of the link's speed that copies from ordinary memory reach
_MIXED = (("feed_forward", 2), ("outputs", 2), ("full", 2))  # half of the blocks; all lies in between


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
        precisions: to choose from, unless `options` ask for one; see `budget.precisions_for`.

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
        reason = unswapped(estimate, options.swap)
        raise ResourceError(
            f"--vram_budget {options.budget.vram_budget} leaves {shown(allowed)} for tensors, and training "
            f"takes at least {summed(smallest.parts)}, with {smallest.flags()}. What helps: "
            f"{_way_out(options)}, or a higher budget.{f' {reason}' if reason else ''}"
        )
    found.sort(key=lambda choice: (choice.cost, choice.memory))
    return MemoryPlan(allowed, tuple(found))


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
    most = 0 if unswapped(estimate, given) else estimate.block_count
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


def unswapped(estimate: MemoryEstimate, given: SwapOptions) -> str | None:
    """Return why no block swap is chosen, unless that is not asked for, or nothing is in its way."""
    return estimate.no_swap_because if given.blocks_to_swap is None else None


def _fits(found: Sequence[Choice], allowed: int) -> bool:
    return any(choice.memory <= allowed for choice in found)


def _fastest(found: Sequence[Choice]) -> float:
    return min(choice.seconds for choice in found)


def _best(found: Sequence[Choice], allowed: int) -> float:
    return min(choice.cost for choice in found if choice.memory <= allowed)
