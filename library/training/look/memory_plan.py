"""What a plan of memory is: ways to make a step, what each takes, and the one that is chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

from library.options.compute import CHECKPOINTS
from library.options.swap import SwapOptions
from library.options.train import TrainOptions
from library.training.look.holdings import Parts
from library.training.look.memory_estimate import Manner, quant_flags, shown, summed

# A step of a quantised model is weighed as if it took that much longer, see `planner`.
RELUCTANCE = {None: 1.0, "fp8": 1.5, "int8": 1.5, "int4": 2.5, "nf4": 2.5}


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
