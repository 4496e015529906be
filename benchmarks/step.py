"""One training step of a LoRA: ours, diffusers + peft, and more; on the same weights.

    python benchmarks/step.py                          # Lumina, bf16, batch 1, one CPU thread
    python benchmarks/step.py --family kandinsky5
    python benchmarks/step.py --dtype fp32 --batch 4
    python benchmarks/step.py --device cuda --size full

All train LoRA of rank 16 on the same layers of the same random transformer, with AdamW and clipping by norm.
Who takes part: see step_lumina.py, step_kandinsky5.py; who needs a package that is missing (`diffusers` and
`peft` are in requirements-dev.txt) does not, and without any rival ours is compared with itself.

Time: steps of ours, theirs and ours again (the control, which shows the noise) take turns in one process;
medians. Where ours is computed by Triton kernels, as on most GPUs, it takes part a third time with
`--fused_kernels torch`. With one CPU thread it is the process's CPU time, which other work on the machine
disturbs least; with several threads it is wall time; on CUDA it is device time. The first step of each is not
counted.
Matmul share: the products that the step cannot do without (no weight gradients of frozen weights, attention
backward = 2 x forward, real text tokens only) over the time that a 1536^3 product, measured between the
steps in the fastest dtype that this processor has for it, says they should take.
Memory: each implementation alone in a process; the peak during two steps, above what was there before them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks.report import Result, add_arguments, matmul_gflops, show, summarise, write  # noqa: E402
from benchmarks.step_kandinsky5 import KANDINSKY5  # noqa: E402
from benchmarks.step_lumina import LUMINA  # noqa: E402
from benchmarks.step_parts import (  # noqa: E402
    Clock,
    Settings,
    add_model_arguments,
    make_step,
    settings_of,
    taking_part,
)
from library.core.errors import UserError  # noqa: E402
from library.nn.kernels import replace_parts, uses_triton  # noqa: E402
from library.nn.products import product_dtype  # noqa: E402
from library.nn.triton_kernels.choice import use_fused_kernels  # noqa: E402

FAMILIES = {family.name: family for family in (LUMINA, KANDINSKY5)}
MATMUL = 1536


def measure_time(settings: Settings, reps: int) -> list[Result]:
    """Print medians of interleaved steps; return them against each rival."""
    family, clock = settings.family, Clock(settings.device)
    work = family.work(settings)
    turns = {name: make_step(make(settings), work) for name, make in taking_part(family).items()}
    rivals = list(turns)[1:] or ["ours"]
    turns["control"] = turns["ours"]
    if uses_triton():
        turns["ours, --fused_kernels torch"] = _by_torch(turns["ours"])
    times: dict[str, list[float]] = {name: [] for name in turns}
    rates: list[float] = []
    square = torch.randn(MATMUL, MATMUL, device=settings.device, dtype=settings.dtype)
    square = square.to(product_dtype(square))
    for rep in range(reps + 1):
        for name, step in turns.items():
            matmul = clock(lambda: square @ square)
            seconds = clock(step)
            if rep:
                rates.append(2 * MATMUL**3 / matmul)
                times[name].append(seconds)
    rate = statistics.median(rates)
    print(f"matmul rate {rate / 1e9:.0f} GFLOP/s in {square.dtype}; {clock.kind} time, {reps} rounds")
    print("| implementation | ms/step | tokens/s | share of matmul rate |\n|---|---|---|---|")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        share = family.useful_flops(settings) / rate / middle
        print(f"| {name} | {middle * 1e3:.0f} | {family.tokens(settings) / middle:.0f} | {share:.3f} |")
    results = []
    for rival in rivals:
        title = f"Step against {rival}: {settings}"
        unit, dtype = f"{clock.kind} seconds", "fp32" if square.dtype == torch.float32 else "bf16"
        results.append(summarise(title, times, rival, rate / 1e9, unit, dtype))
        show(results[-1], "step")
    return results


def _by_torch(step: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        replace_parts("torch")
        try:
            return step()
        finally:
            replace_parts("triton")

    return call


def peak_above_weights(settings: Settings, name: str) -> dict[str, float]:
    """Return MB before the first step and the peak during two steps; meant for a process of its own."""
    step = make_step(settings.family.contestants[name](settings), settings.family.work(settings))
    if settings.device.type == "cuda":
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what building the model left behind would be used by the step, uncounted
        Path("/proc/self/clear_refs").write_text("5")  # lowers the recorded peak to the present size
        base = _status_bytes("VmRSS")
    step()
    step()
    peak = torch.cuda.max_memory_allocated() if settings.device.type == "cuda" else _status_bytes("VmHWM")
    return {"base": base / 2**20, "peak": peak / 2**20}


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure_memory(settings: Settings, arguments: list[str]) -> dict[str, float]:
    """Return MB of each implementation, measured in a child process (Linux only on the CPU)."""
    peaks = {}
    for name in taking_part(settings.family):
        command = [sys.executable, __file__, *arguments, "--memory_of", name]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(result.stdout.splitlines()[-1])
        peaks[name] = found["peak"] - found["base"]
    return peaks


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser, FAMILIES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in both")
    parser.add_argument("--fused_kernels", choices=("auto", "torch", "triton"), default="auto")
    parser.add_argument("--only", choices=("time", "memory"), help="measure just this")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    add_arguments(parser, rounds=6)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Measure and print."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    settings = settings_of(args, FAMILIES[args.family], checkpointing=args.checkpointing)
    try:
        obstacle = use_fused_kernels(args.fused_kernels, settings.device, settings.dtype)
    except UserError as error:
        raise SystemExit(str(error)) from None
    if obstacle is not None:
        print(f"Ours is computed by torch, and not by Triton: {obstacle}.", file=sys.stderr)
    if args.memory_of:
        print(json.dumps(peak_above_weights(settings, args.memory_of)))
        return
    print(f"{settings}, {args.threads} thread(s)")
    results = [] if args.only == "memory" else measure_time(settings, args.rounds)
    if args.only != "time":
        peaks = measure_memory(settings, arguments)
        title = f"Peak memory of a step above what was there before: {settings}"
        figures = {name: [peak] for name, peak in peaks.items()}
        rival = next(iter([*figures][1:]), "ours")
        results.append(summarise(title, figures, rival, matmul_gflops(), "MB"))
        show(results[-1], "step")
    write(results, args.json)


if __name__ == "__main__":
    main(sys.argv[1:])
