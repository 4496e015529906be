"""--vram_budget in a run: how much tensors may take, what is planned for that, and what the user is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from library.core.errors import ConfigError, ResourceError
from library.core.log import logger
from library.options.budget import AUTO
from library.options.train import TrainOptions
from library.training.look.memory_estimate import (
    DRAWING,
    LATENT_PASS,
    TEXT_PASS,
    MemoryEstimate,
    free_memory,
    shown,
    summed,
)
from library.training.look.memory_plan import Choice, MemoryPlan
from library.training.look.meter import Speeds
from library.training.look.planner import make_plan, unswapped
from library.training.look.texts import longest_text

if TYPE_CHECKING:
    from library.training.context import RunContext

OVERHEAD = 600 * 2**20  # a driver's own memory and the libraries' work space, which no tensor has
LATER = 256 * 2**20  # kernels and work space that a running program still loads
SLACK = 1.05  # what the allocator holds, for each byte of tensors
PRECISIONS = (None, "int8", "nf4")  # tried where none is given; int8 is nearer to the original than fp8

_LESS_FOR = {  # a phase beside training
    TEXT_PASS: "less with --text_encoder_quant int8 or a smaller --text_encoder_batch_size; nothing if all "
    "texts are cached already",
    LATENT_PASS: "less with a smaller --vae_batch_size; nothing if all latents are cached already",
    DRAWING: "less with smaller sample pictures or a smaller --sample_batch_size",
}

_log = logger("budget")


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
    tokens = longest_text(context.trainer, context.prepared.manifest)
    estimate = MemoryEstimate(context.trainer, context, tokens=tokens, speeds=speeds)
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
    """Return the schemes of `library.nn.weights.schemes` that may be chosen for a run that is given none.

    A model whose own weights are trained, or that is quantised in its file, keeps its precision, and a
    resumed run keeps what it had.
    """
    prepared = context.prepared
    if not context.options.trainee.freezes_dit or estimate.comes_quantised:
        return (None,)
    return PRECISIONS if prepared.resumed is None else (prepared.settings["base_quant"],)


def _warnings(
    estimate: MemoryEstimate, plan: MemoryPlan, options: TrainOptions, device: torch.device
) -> Iterator[str]:
    chosen = plan.chosen
    if reason := unswapped(estimate, options.swap):
        yield reason
    if device.type != "cuda":
        yield f"this is a plan for a GPU: on '{device}' swapping blocks saves no memory"
    if (elsewhere := sum(chosen.elsewhere.values())) > (free := free_memory()):
        yield (f"swapped blocks take {shown(elsewhere)} of the computer's memory; {shown(free)} are free")
    for phase, parts in estimate.other_phases(chosen.manner, chosen.swap).items():
        if sum(parts.values()) > plan.allowed:
            yield f"{phase} may take more, {summed(parts)}: {_LESS_FOR[phase]}"
