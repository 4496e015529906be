"""What a step takes of memory beside weights, in every checkpoint mode, against diffusers + peft.

    python benchmarks/memory.py                          # Lumina, bf16, batch 1
    python benchmarks/memory.py --family kandinsky5 --dtype fp32 --json memory.json
    python benchmarks/memory.py --device cuda --size full

The same models, LoRAs and batch as in step.py, rivals with and without checkpointing. Kept: bytes of tensors
that are alive after the forward pass and were not before. Peak: the most that are, forward and backward,
gradients included; the optimizer's are not. Both are counts of torch's own allocator, the same in each run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks.modes import kept_bytes  # noqa: E402
from benchmarks.report import Result, matmul_gflops, show, summarise, write  # noqa: E402
from benchmarks.step import FAMILIES  # noqa: E402
from benchmarks.step_parts import (  # noqa: E402
    Contestant,
    Settings,
    add_model_arguments,
    settings_of,
    taking_part,
)
from library.nn.running.runner import MODES  # noqa: E402


def allocated(action: Callable[[], object]) -> int:
    """Return the most bytes that an action had of torch's allocator for the CPU at once."""
    with torch.profiler.profile(profile_memory=True) as profile:
        action()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = [event["args"] for event in events if event["name"] == "[memory]"]
    # The allocator's own count: the order of the events is that of clocks, which differ between processors.
    totals = [change["Total Allocated"] for change in changes]
    return max(totals) - (totals[0] - changes[0]["Bytes"])


def peak_bytes(contestant: Contestant, work: Any) -> int:
    """Return the most bytes that forward and backward have at once, beside what was there before."""

    def step() -> None:
        contestant.loss(work).backward()
        for weight in contestant.trained:
            weight.grad = None

    step()  # makes tables that stay
    if work.latents_BCHW.device.type != "cuda":
        return allocated(step)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def measure(settings: Settings) -> list[Result]:
    """Print a table of what is kept and one of peaks; return them."""
    work, kept, peaks = settings.family.work(settings), {}, {}

    def add(name: str, contestant: Contestant) -> None:
        peaks[name] = [peak_bytes(contestant, work) / 2**20]
        kept[name] = [kept_bytes(contestant, work) / 2**20]

    for name, make in taking_part(settings.family).items():
        if name == "ours":
            ours = make(settings)
            for mode in MODES:
                ours.model.runner.keep(mode)
                add(f"ours, {mode}", ours)
            continue
        add(name, make(settings))
        add(f"{name}, checkpointing", make(replace(settings, checkpointing=True)))
    rival = next((name for name in kept if not name.startswith("ours")), f"ours, {MODES[0]}")
    results = []
    for what, figures in (("Kept for backward", kept), ("Peak of a step", peaks)):
        results.append(summarise(f"{what}: {settings}", figures, rival, matmul_gflops(), "MB"))
        show(results[-1], "memory")
    return results


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser, FAMILIES)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    write(measure(settings_of(given, FAMILIES[given.family])), given.json)


if __name__ == "__main__":
    main()
