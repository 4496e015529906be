"""All that matters of a training step on a GPU, in one command that keeps to a time.

    python benchmarks/gpu.py                                     # both families, about 9 minutes at most
    python benchmarks/gpu.py --minutes 25 --json gpu.json
    python benchmarks/gpu.py --family lumina --sides 1024 --batches 1 --ways none outputs "none, triton"
    python benchmarks/gpu.py --size nano --device cpu            # without a GPU: does everything run?

The models are those of step.py at their real sizes (Lumina 2.6 B, Kandinsky 6 B), with random weights drawn
on the device, in bf16; a LoRA of rank 16, AdamW, clipping by norm. Rows come in the order of their importance
(gpu_ways.py), each is printed when it is there, and what the time does not suffice for is said. A row that
has begun is finished. At the end come tables for docs/performance.md; with --json the figures are written as
report.py does, after each row.

- s/step: a whole step, between two events of the device, with a wait for it after each step; the median of 3
  to 10 steps, after two that are not counted. The learning rate is 0: all ways compute the same step.
- share: of the matmul rate. The products that the step cannot do without (no weight gradients of frozen
  weights, nothing computed twice, real tokens only), over the time that the rate of one product of square
  bf16 matrices says they should take. Ways that compute products again, or in 8 bits, are held to the same.
- to its base: the time over that of the way without what the row is about: for modes, kernels and
  quantisation `none`, for block swap the same mode without it, for rivals with checkpointing `full`.
- GiB: the most that torch had allocated during the steps, weights and optimizer included.
- loss, gradient: how far those of the first step are from the plain way's (everything kept) at the same size,
  relative; for the gradient the norm of the difference. "to fp32": the loss from that of the same weights in
  fp32. Ways that only keep less must give the same loss bit for bit; gpu_ways.py says how far others may be.
  More than that is a failure. Gradients of attention on a GPU differ from call to call.
- Rivals: diffusers + peft, and the reference tool's arithmetic (reference_model.py); eager, with and without
  checkpointing of whole blocks. One whose package is missing does not take part. Their LoRA starts with other
  numbers, so that their losses are not compared.
- Block swap: the weights wait in page-locked memory.

The exit code is 1 if a way failed or its loss is off, else 0. What this machine does not have (a package, a
device) and what does not fit into its memory is said in its row, and is no failure.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.core.entry import run_script  # noqa: E402
from library.core.versions import require_torch  # noqa: E402

run_script(require_torch)  # an old one may fail while it, or what uses it, is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.gpu_table import HEAD, LEFT_OUT, Found, line, results, tables  # noqa: E402
from benchmarks.gpu_ways import (  # noqa: E402
    BATCHES,
    BF16_MAY_DIFFER,
    FP32,
    GRADIENT_MAY_DIFFER,
    PLAIN,
    SIDES,
    Case,
    Way,
    plan,
)
from benchmarks.report import device_to_measure, missing_packages, write  # noqa: E402
from benchmarks.step import FAMILIES  # noqa: E402
from benchmarks.step_parts import Clock, Contestant, Settings, make_step  # noqa: E402
from library.core.device import empty_cache  # noqa: E402
from library.core.errors import ConfigError, UserError  # noqa: E402
from library.nn.attention import prepare_kernel  # noqa: E402
from library.nn.kernels import replace_parts  # noqa: E402
from library.nn.running.compiling import check_compiler, part_compiler  # noqa: E402
from library.nn.triton_kernels.choice import use_fused_kernels  # noqa: E402
from library.options.compute import ComputeOptions  # noqa: E402
from library.options.quant import QuantOptions  # noqa: E402
from library.options.swap import SwapOptions  # noqa: E402
from library.training.guards import is_out_of_memory  # noqa: E402

GIB = 2**30
PIXELS_A_LATENT = {"full": 8, "mid": 16, "nano": 64}  # small models get small pictures
COMPILER_NEEDS = 100.0  # seconds that must be left for it on a GPU
STEPS = (3, 10)  # that are timed, at least and at most
ENOUGH = 2.0  # seconds after which no step is added


@dataclass(frozen=True)
class FirstStep:
    """Loss and gradient of a way."""

    loss: float
    gradient: Tensor

    def off(self, other: FirstStep) -> tuple[float, float]:
        """Return how far loss and gradient are from another's, relative."""
        difference = (self.gradient - other.gradient).norm() / other.gradient.norm()
        return abs(self.loss - other.loss) / abs(other.loss), difference.item()


class Bench:
    """Measures one case after another; keeps the model as long as cases share it."""

    def __init__(self, size: str, device: torch.device, deadline: float, matmul_rate: float) -> None:
        self.size, self.device, self.deadline, self.matmul_rate = size, device, deadline, matmul_rate
        self.on_gpu = device.type == "cuda"
        self._clock = Clock(device)
        self._firsts: dict[tuple[object, ...], FirstStep] = {}
        self._built: tuple[object, ...] | None = None
        self._contestant: Contestant | None = None

    def measure(self, case: Case) -> Found:
        """Measure a case, or say why that cannot be."""
        left = self.deadline - time.monotonic()
        if left <= 0 or (case.way.compiled and self.on_gpu and left < COMPILER_NEEDS):
            return Found(trouble=LEFT_OUT)
        trouble, failed = "", False
        try:
            return self._measure(case)
        except UserError as error:
            trouble = f"not here: {error}"
        except Exception as error:  # one way's failure is not the others'; the exit code tells of it
            failed, trouble = not is_out_of_memory(error), "out of memory"
            if failed:
                traceback.print_exc()
                trouble = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        finally:
            replace_parts("torch")
        self.free()  # by now the error is gone, and with it what it held
        return Found(trouble=trouble, failed=failed)

    def free(self) -> None:
        """Let go of the model."""
        self._contestant = self._built = None
        gc.collect()
        empty_cache(self.device)

    def _measure(self, case: Case) -> Found:
        way, settings = case.way, self._settings(case)
        self._check(way, settings)
        contestant, work = self._contestant_for(case, settings), settings.family.work(settings)
        if way.who == "ours":
            contestant.model.use_attention(way.attention)
            contestant.model.runner.keep(way.mode)
            replace_parts(way.kernels)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        found = self._first_step(case, contestant, work)
        if not way.timed:
            return found
        seconds = self._time(make_step(contestant, work, lr=0.0))
        peak = torch.cuda.max_memory_allocated(self.device) / GIB if self.on_gpu else None
        once = replace(settings, checkpointing=False)  # nothing is useful twice
        least = settings.family.useful_flops(once) / self.matmul_rate
        return replace(found, seconds=seconds, peak=peak, share=least / statistics.median(seconds))

    def _settings(self, case: Case) -> Settings:
        family, way = FAMILIES[case.family], case.way
        size = replace(family.sizes[self.size], latent=case.side // PIXELS_A_LATENT[self.size])
        swap = SwapOptions(
            blocks_to_swap=round(way.swapped * size.params.n_blocks),
            use_pinned_memory_for_block_swap=self.on_gpu,
        )
        return Settings(
            replace(family, sizes={self.size: size}),
            self.size,
            way.dtype,
            case.batch,
            self.device,
            checkpointing=way.who != "ours" and way.mode == "full",
            quant=QuantOptions(base_quant=way.quant, quant_matmul=way.quant_matmul),
            swap=swap,
        )

    def _check(self, way: Way, settings: Settings) -> None:
        """Raise UserError for what this machine does not have."""
        missing = missing_packages(*settings.family.contestants[way.who].packages)
        if missing:
            raise ConfigError(f"{missing} not installed.")
        prepare_kernel(way.attention, self.device, way.dtype)
        torch.backends.cuda.enable_cudnn_sdp(way.who != "ours")  # rivals leave it as torch has it
        use_fused_kernels(way.kernels, self.device, way.dtype)
        replace_parts("torch")

    def _contestant_for(self, case: Case, settings: Settings) -> Contestant:
        built = (case.family, *case.way.build)
        if self._built != built or self._contestant is None:
            self.free()
            contestant = settings.family.contestants[case.way.who](settings)
            if case.way.compiled:  # without a GPU only traced, which shows as much
                backend = "inductor" if self.on_gpu else "eager"
                options = ComputeOptions(torch_compile=True, dynamo_backend=backend)
                check_compiler(options, self.device)
                contestant.model.runner.compile(part_compiler(options))
            self._contestant, self._built = contestant, built
        return self._contestant

    def _first_step(self, case: Case, contestant: Contestant, work: object) -> Found:
        """Compare loss and gradient."""
        loss = contestant.loss(work)
        loss.backward()
        if case.way.who != "ours":
            return Found(loss=loss.item())
        gradient = torch.cat([weight.grad.flatten().float().cpu() for weight in contestant.trained])
        first = FirstStep(loss.item(), gradient)
        if case.way.name in (PLAIN, FP32):
            self._firsts[*case.place, case.way.name] = first
        found = Found(loss=first.loss)
        plain, exact = (self._firsts.get((*case.place, name)) for name in (PLAIN, FP32))
        if exact is not None:
            found = replace(found, fp32_off=first.off(exact)[0])
        if plain is not None:
            loss_off, gradient_off = first.off(plain)
            found = replace(found, loss_off=loss_off, gradient_off=gradient_off)
        return self._judged(case.way, found)

    def _judged(self, way: Way, found: Found) -> Found:
        limits = [("the loss", found.loss_off, way.tolerance)]
        if way.name == PLAIN:
            limits.append(("the loss in bf16", found.fp32_off, BF16_MAY_DIFFER))
        if way.quant is None and way.name != FP32:
            limits.append(("the gradient", found.gradient_off, GRADIENT_MAY_DIFFER))
        for what, off, allowed in limits:
            if off is not None and not off <= allowed:  # NaN is off, too
                trouble = f"FAILED: {what} may be off by {allowed:g}"
                return replace(found, failed=True, trouble=trouble)
        return found

    def _time(self, step: Callable[[], None]) -> tuple[float, ...]:
        fewest, most = STEPS
        for _ in range(2):
            step()
        seconds: list[float] = []
        enough = ENOUGH if self.on_gpu else 0.0  # elsewhere it is about whether all runs
        while len(seconds) < fewest or (len(seconds) < most and sum(seconds) < enough):
            seconds.append(self._clock(step))
        return tuple(seconds)


def rate_of_products(device: torch.device, side: int) -> float:
    """Return the operations a second of one product of square bf16 matrices, where many are computed."""
    square, clock = torch.randn(side, side, device=device).bfloat16(), Clock(device)
    seconds = [clock(lambda: square @ square) for _ in range(60)]
    return 2 * side**3 / statistics.median(seconds[10:])


def rates_of_copies(device: torch.device, size: int) -> dict[str, float]:
    """Return GB a second of copies of `size` bytes: within the device, and from and to page-locked memory."""
    here, there = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    outside, clock = torch.empty(size, dtype=torch.uint8, pin_memory=True), Clock(device)
    ways = {
        "within the device": lambda: there.copy_(here),
        "to the device": lambda: here.copy_(outside, non_blocking=True),
        "from the device": lambda: outside.copy_(here, non_blocking=True),
    }
    return {name: size / 1e9 / min(clock(copy) for _ in range(5)) for name, copy in ways.items()}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="after which no other row is begun")
    parser.add_argument("--family", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--size", choices=tuple(PIXELS_A_LATENT), default="full")
    parser.add_argument("--sides", nargs="+", type=int, choices=SIDES, default=SIDES, help="of pictures, px")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--ways", nargs="+", help="only these rows, by their names, and the plain ones")
    parser.add_argument("--device", help="default: the GPU")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args(arguments)


def chosen_cases(given: argparse.Namespace) -> list[Case]:
    """Return what is to be measured. Raises ConfigError for a way that there is not."""
    cases = list(plan(given.family, given.sides, given.batches))
    cases = [case for case in cases if case.way.who in FAMILIES[case.family].contestants]
    names = list(dict.fromkeys(case.way.name for case in cases))
    for name in given.ways or ():
        if name not in names:
            raise ConfigError(f"There is no way '{name}'; there are: {'; '.join(names)}.")
    wanted = (FP32, PLAIN, *given.ways) if given.ways else names
    return [case for case in cases if case.way.name in wanted]


def main(arguments: list[str]) -> int:
    """Measure and print; return the exit code."""
    given, begin = parse(arguments), time.monotonic()
    try:
        cases = chosen_cases(given)
        device = device_to_measure(given.device)
        if given.size == "full" and device.type == "cpu":
            raise ConfigError("Nothing to measure here: there is no GPU. --size nano shows whether all runs.")
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    logging.getLogger("flow_scripts").setLevel(logging.ERROR)
    if device.type == "cpu":
        torch.set_num_threads(1)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    small = device.type != "cuda" or given.size == "nano"  # where only all has to run
    rate = rate_of_products(device, 512 if small else 8192)
    print(f"{machine}, torch {torch.__version__}: bf16 products {rate / 1e12:.3g} TFLOP/s", flush=True)
    if device.type == "cuda":
        rates = rates_of_copies(device, GIB // 64 if small else GIB).items()
        print("; ".join(f"copies {name} {speed:.1f} GB/s" for name, speed in rates))
    else:
        print("copies and peaks of memory are measured on a CUDA device only")
    if given.size != "full":
        print(f"{given.size}: pictures are {PIXELS_A_LATENT[given.size] // 8} times as small as it says here")
    print(f"\n{HEAD}", flush=True)
    bench = Bench(given.size, device, begin + 60 * given.minutes, rate)
    all_found: dict[Case, Found] = {}
    for case in cases:
        all_found[case] = bench.measure(case)
        if all_found[case].trouble == LEFT_OUT:
            continue
        print(line(case, all_found[case], all_found), flush=True)
        write(results(all_found, machine, rate), given.json)
    left_out = sum(found.trouble == LEFT_OUT for found in all_found.values())
    if left_out:
        print(f"\n{left_out} rows are left out: no time was left; see --minutes.")
    print(f"\n{tables(all_found)}\n\n{time.monotonic() - begin:.0f} s")
    return int(any(found.failed for found in all_found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
