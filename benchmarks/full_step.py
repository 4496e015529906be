"""One training step of a whole model: all of its weights are trained, ours against diffusers.

    python benchmarks/full_step.py                          # Lumina, bf16, batch 1, one CPU thread
    python benchmarks/full_step.py --family kandinsky5 --checkpointing
    python benchmarks/full_step.py --device cuda --size full

The same random transformers as in step.py, with torch's AdamW and clipping by norm for both; steps take turns
in one process, ours twice (the control, which shows the noise). With --dtype bf16 both keep their weights in
bf16; "diffusers, fp32 weights" is diffusers under autocast, as its own training scripts use it. Time is the
process's CPU time with one CPU thread, else wall time. Without diffusers ours is compared with itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import step_kandinsky5, step_lumina  # noqa: E402
from benchmarks.report import Clock, Result, add_arguments, show, take_turns, write  # noqa: E402
from benchmarks.step_parts import (  # noqa: E402
    Settings,
    add_model_arguments,
    make_step,
    settings_of,
    taking_part,
)

FAMILIES = {
    "lumina": (step_lumina.LUMINA, step_lumina),
    "kandinsky5": (step_kandinsky5.KANDINSKY5, step_kandinsky5),
}


class Whole:
    """A model that is trained as it is."""

    packages: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        """`loss` takes the model and a batch."""
        self.model = model
        self.trained = list(model.parameters())
        self._loss = loss

    def loss(self, work: object) -> Tensor:
        """Forward."""
        return self._loss(self.model, work)


def contestants(settings: Settings, module: ModuleType) -> dict[str, Whole]:
    """Make all that take part. `module`: of the family."""
    theirs = partial(module.their_loss, dtype=settings.dtype)
    found = {"ours": Whole(module.our_model(settings), module.our_loss)}
    if "diffusers" not in taking_part(settings.family):
        return found
    found["diffusers"] = Whole(module.their_model(settings), theirs)
    if settings.dtype != torch.float32:
        wide = module.their_model(replace(settings, dtype=torch.float32))
        found["diffusers, fp32 weights"] = Whole(wide, theirs)
    return found


def measure(settings: Settings, module: ModuleType, rounds: int) -> Result:
    """Let all take turns; print the table and return it."""
    work = settings.family.work(settings)
    found = contestants(settings, module)
    steps = {name: make_step(contestant, work) for name, contestant in found.items()}
    steps["control"] = steps["ours"]
    clock, unit = _clock(settings.device)
    count = sum(weight.numel() for weight in found["ours"].trained)
    result = take_turns(
        f"Step of all {count / 1e6:.0f} million weights: {settings}",
        steps,
        rival="diffusers" if "diffusers" in found else "ours",
        rounds=rounds,
        clock=clock,
        unit=unit,
    )
    show(result, "full_step")
    return result


def _clock(device: torch.device) -> tuple[Clock, str]:
    """Return a clock, and the unit of what it tells."""
    if device.type != "cuda":
        one = torch.get_num_threads() == 1
        return (time.process_time, "CPU s") if one else (time.perf_counter, "s")

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now, "s"


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser, FAMILIES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in both")
    add_arguments(parser, rounds=4)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    family, module = FAMILIES[given.family]
    settings = settings_of(given, family, checkpointing=given.checkpointing)
    write([measure(settings, module, given.rounds)], given.json)


if __name__ == "__main__":
    main()
