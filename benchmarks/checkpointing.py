"""What gradient checkpointing costs: the seconds that it adds to a step, ours against the rivals'.

    python benchmarks/checkpointing.py                      # Lumina, bf16, batch 1, one CPU thread
    python benchmarks/checkpointing.py --dtype fp32
    python benchmarks/checkpointing.py --family kandinsky5 --rivals diffusers

The same models and LoRA as in step.py. Steps with and without checkpointing of all of them take turns in one
process. What counts is the difference within a round: of ours to the step that keeps everything, of a rival
to its own step without checkpointing. Modes are those of `library.nn.running.runner`; the first one
given is measured twice, which shows the noise.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks.report import Result, add_arguments, matmul_gflops, show, summarise, write  # noqa: E402
from benchmarks.step import FAMILIES  # noqa: E402
from benchmarks.step_parts import (  # noqa: E402
    Clock,
    Settings,
    add_model_arguments,
    make_step,
    settings_of,
    taking_part,
)
from library.nn.running.runner import MODES  # noqa: E402

CONTROL = "control"


def measure(settings: Settings, rounds: int, modes: Sequence[str], rivals: Sequence[str]) -> list[Result]:
    """Print medians of steps; return the extra seconds against each rival."""
    steps, base = _steps(settings, modes, rivals)
    clock = Clock(settings.device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    rates = []
    for number in range(rounds + 1):
        for name, step in steps.items():
            rates.append(matmul_gflops())
            seconds = clock(step)
            if number:
                times[name].append(seconds)
    print(f"{clock.kind} seconds of a step, medians of {rounds} rounds: {settings}")
    for name, seconds in times.items():
        print(f"  {name}: {statistics.median(seconds):.3f}")
    extra = {
        name: [with_it - without for with_it, without in zip(times[name], times[plain], strict=True)]
        for name, plain in base.items()
    }
    results = []
    for rival in rivals:
        title = f"Extra time of checkpointing against {rival}: {settings}"
        results.append(summarise(title, extra, rival, statistics.median(rates), f"{clock.kind} seconds"))
        show(results[-1], "checkpointing")
    return results


def _steps(
    settings: Settings, modes: Sequence[str], rivals: Sequence[str]
) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """Return steps by name, and for those with checkpointing the name of that without."""
    family, work = settings.family, settings.family.work(settings)
    ours = family.contestants["ours"](settings)
    step = make_step(ours, work)

    def in_mode(mode: str) -> None:
        ours.model.runner.keep(mode)
        step()

    plain = "ours, nothing computed again"
    steps: dict[str, Callable[[], None]] = {plain: partial(in_mode, "none")}
    base: dict[str, str] = {}
    for mode in modes:
        steps[f"ours, {mode}"] = partial(in_mode, mode)
    steps[CONTROL] = partial(in_mode, modes[0])
    base |= dict.fromkeys([*(f"ours, {mode}" for mode in modes), CONTROL], plain)
    for rival in rivals:
        for name, checkpointing in ((f"{rival}, no checkpointing", False), (rival, True)):
            contestant = family.contestants[rival](replace(settings, checkpointing=checkpointing))
            steps[name] = make_step(contestant, work)
        base[rival] = f"{rival}, no checkpointing"
    return steps, base


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_arguments(parser, FAMILIES)
    parser.add_argument("--modes", nargs="+", choices=MODES[1:], default=["outputs", "full"])
    parser.add_argument("--rivals", nargs="+", choices=("reference", "diffusers"), default=["reference"])
    add_arguments(parser, rounds=5)
    given = parser.parse_args()
    if given.device.type == "cpu":
        torch.set_num_threads(1)
    settings = settings_of(given, FAMILIES[given.family])
    available = taking_part(settings.family)
    rivals = [rival for rival in given.rivals if rival in available]
    if not rivals:
        raise SystemExit(f"{given.family} has no rival here to compare with; see --rivals.")
    write(measure(settings, given.rounds, given.modes, rivals), given.json)


if __name__ == "__main__":
    main()
