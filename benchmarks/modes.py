"""What each way of running the blocks costs and saves: checkpoint modes and torch.compile, in one process.

    python benchmarks/modes.py                        # bf16, batch 1, one CPU thread
    python benchmarks/modes.py --dtype fp32 --compile
    python benchmarks/modes.py --device cuda --size full

The same model and LoRA as in step.py. Steps of all modes take turns; medians; the first step of each is not
counted. Kept: bytes that are alive after the forward pass and were not before it, measured once a mode, and
for the rivals too.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks.step import FAMILIES  # noqa: E402
from benchmarks.step_parts import (  # noqa: E402
    Clock,
    Contestant,
    Settings,
    add_model_arguments,
    make_step,
    settings_of,
    taking_part,
)
from library.nn.running.compiling import part_compiler  # noqa: E402
from library.nn.running.runner import MODES  # noqa: E402
from library.options.compute import ComputeOptions  # noqa: E402


def measure(settings: Settings, reps: int, *, compiled: bool) -> None:
    """Print a table of all modes, each as a ratio to keeping everything."""
    ours, work = settings.family.contestants["ours"], settings.family.work(settings)
    clock, model = Clock(settings.device), ours(settings)
    step = make_step(model, work)
    runners = {mode: model for mode in MODES}
    steps = dict.fromkeys(runners, step)
    if compiled:
        other = ours(settings)
        other.model.runner.compile(part_compiler(ComputeOptions(torch_compile=True)))
        for mode in ("none", "full"):
            runners[f"{mode}, compiled"], steps[f"{mode}, compiled"] = other, make_step(other, work)
    times: dict[str, list[float]] = {name: [] for name in runners}
    for rep in range(reps + 1):
        for name, contestant in runners.items():
            contestant.model.runner.keep(name.partition(",")[0])
            seconds = clock(steps[name])
            if rep:
                times[name].append(seconds)
    print(f"{clock.kind} time, {reps} rounds, {settings.size}, {settings.dtype}, batch {settings.batch}")
    print("| mode | ms/step | ratio to none (least .. most) | kept, MB |\n| --- | --- | --- | --- |")
    for name, seconds in times.items():
        runners[name].model.runner.keep(name.partition(",")[0])
        pairs = sorted(a / b for a, b in zip(seconds, times["none"], strict=True))
        ratio = f"{statistics.median(pairs):.3f} ({pairs[0]:.3f} .. {pairs[-1]:.3f})"
        kept = kept_bytes(runners[name], work) / 2**20
        print(f"| {name} | {statistics.median(seconds) * 1e3:.0f} | {ratio} | {kept:.0f} |")
    for name, rival in list(taking_part(settings.family).items())[1:]:
        print(f"| {name} | | | {kept_bytes(rival(settings), work) / 2**20:.0f} |")


def kept_bytes(contestant: Contestant, work: Any) -> int:
    """Return the bytes of tensors on the model's device that a forward pass leaves alive."""
    device = work.latents_BCHW.device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        loss = contestant.loss(work)
        return torch.cuda.memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = contestant.loss(work)
    del loss
    gc.collect()
    return sum(event.self_cpu_memory_usage for event in profile.events())


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_arguments(parser, FAMILIES)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compiled blocks too")
    given = parser.parse_args()
    if given.device.type == "cpu":
        torch.set_num_threads(1)
    measure(settings_of(given, FAMILIES[given.family]), given.reps, compiled=given.compile)


if __name__ == "__main__":
    main()
