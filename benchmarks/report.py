"""What the benchmarks share: the machine's own pace, contestants that take turns, tables, results to compare.

Contestants take turns, round by round, so that other work on the machine hits all of them alike. Of each the
median counts, and the ratio is the median over the rounds of its time to the rival's in the same round. A
matmul of 1536^3 in fp32 is timed between them: it tells how fast the machine was.

`--json FILE` writes the results. Beside its figures every benchmark prints those that were last committed in
benchmarks/results/; times are scaled to the pace of this machine by the matmul rates of both.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from library.core.device import device_named
from library.core.errors import ConfigError

RESULTS = Path(__file__).parent / "results"
MATMUL = 1536
Clock = Callable[[], float]


@dataclass(frozen=True)
class Row:
    """One contestant: the median of its figures, and the median, least and most ratio to the rival."""

    name: str
    median: float
    ratio: float
    least: float
    most: float


@dataclass(frozen=True)
class Result:
    """A table: what was measured, in which unit ("CPU s", "s" of wall time, "MB"), and at which pace."""

    title: str
    unit: str
    rows: list[Row]
    matmul_gflops: float
    rounds: int
    matmul_dtype: str = "fp32"


def missing_packages(*packages: str) -> str:
    """Return which packages are missing, as the beginning of "... not installed."; nothing, if none is."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'}" if missing else ""


def require(*packages: str) -> None:
    """End the program with a sentence if a package is missing that nothing can be measured without."""
    if missing := missing_packages(*packages):
        raise SystemExit(f"Nothing to measure here: {missing} not installed.")


def device_to_measure(name: str | None) -> torch.device:
    """Return the device that --device names, None being the best one; end the program with a sentence if it
    is not there."""
    try:
        return device_named(name)
    except ConfigError as error:
        print(f"Nothing to measure here: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def take_turns(
    title: str,
    contestants: Mapping[str, Callable[[], object]],
    *,
    rival: str,
    rounds: int,
    clock: Clock = time.process_time,
    unit: str = "CPU s",
) -> Result:
    """Time contestants against `rival`, one of them; a first round of each is not counted.

    unit: what the clock tells.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    rates = []
    for number in range(rounds + 1):
        for name, work in contestants.items():
            rates.append(matmul_gflops())
            seconds = _seconds(work, clock)
            if number:
                times[name].append(seconds)
    return summarise(title, times, rival, statistics.median(rates), unit)


def matmul_gflops() -> float:
    """Return the rate of one product of fp32 matrices on the CPU, now."""
    square = torch.ones(MATMUL, MATMUL)
    return 2 * MATMUL**3 / 1e9 / _seconds(lambda: square @ square, time.process_time)


def summarise(
    title: str,
    figures: Mapping[str, list[float]],
    rival: str,
    matmul_gflops: float,
    unit: str,
    matmul_dtype: str = "fp32",
) -> Result:
    """Return medians and ratios of figures that were taken round by round."""
    rows = []
    for name, mine in figures.items():
        ratios = sorted(ours / theirs for ours, theirs in zip(mine, figures[rival], strict=True))
        rows.append(Row(name, statistics.median(mine), statistics.median(ratios), ratios[0], ratios[-1]))
    return Result(title, unit, rows, matmul_gflops, len(figures[rival]), matmul_dtype)


def show(result: Result, benchmark: str, *, in_ms: bool = False) -> None:
    """Print a table, and beside each figure that of the last committed results, at this machine's pace.

    benchmark: the name of its results, `benchmarks/results/<benchmark>.json`. in_ms: print seconds, which
    results have, as milliseconds.
    """
    unit, factor, digits = result.unit, 1, 3
    if in_ms:
        unit, factor, digits = unit.replace("seconds", "ms"), 1000, 2
    before = _committed(RESULTS / f"{benchmark}.json", result)
    rate = f"{result.matmul_gflops:.0f} GFLOP/s in {result.matmul_dtype}"
    print(f"\n{result.title}\n{rate}; medians of {result.rounds} rounds\n")
    print(f"| | {unit} | ratio (least .. most) | committed |\n| --- | --- | --- | --- |")
    for row in result.rows:
        old = f"{factor * before[row.name]:.{digits}f}" if row.name in before else "-"
        ratio = f"{row.ratio:.3f} ({row.least:.3f} .. {row.most:.3f})"
        print(f"| {row.name} | {factor * row.median:.{digits}f} | {ratio} | {old} |")


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the flags of every benchmark."""
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each takes its turn")
    parser.add_argument("--json", type=Path, help="write the results to this file")


def write(results: list[Result], path: Path | None) -> None:
    """Write results, with the machine's name, if a file is given. Other results in it stay."""
    if path is None:
        return
    capabilities = torch.cpu.get_capabilities()
    machine = f"{capabilities.get('cpu_name')}, {capabilities.get('num_logical_cores')} logical cores"
    about = {"machine": machine, "system": platform.platform(), "torch": torch.__version__}
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    new = {result.title: about | asdict(result) for result in results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_read(path) | new, indent=1) + "\n", encoding="utf-8")


def _committed(path: Path, now: Result) -> dict[str, float]:
    """Return the medians of an earlier result by name; times as they would be at this machine's pace. There
    are none of a machine whose fastest products are of another dtype."""
    old = _read(path).get(now.title)
    if old is None:
        return {}
    timed = now.unit.endswith("s")
    if timed and old.get("matmul_dtype", "fp32") != now.matmul_dtype:
        return {}
    pace = old["matmul_gflops"] / now.matmul_gflops if timed else 1
    return {row["name"]: row["median"] * pace for row in old["rows"]}


def _read(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _seconds(work: Callable[[], object], clock: Clock) -> float:
    begin = clock()
    work()
    return clock() - begin
