"""What benchmarks/gpu.py found: as rows while it measures, as tables at the end, as results in a file."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.gpu_ways import Case
from benchmarks.report import Result, Row

HEAD = (
    "| family | side | batch | way | s/step | share | to its base | GiB | loss | gradient | to fp32 |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


LEFT_OUT = "left out"


@dataclass(frozen=True)
class Found:
    """What was measured of a case; `trouble` says why it was not. Differences are relative."""

    seconds: tuple[float, ...] = ()
    share: float | None = None
    peak: float | None = None
    loss: float | None = None
    loss_off: float | None = None
    gradient_off: float | None = None
    fp32_off: float | None = None
    trouble: str = ""
    failed: bool = False

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


def line(case: Case, found: Found, all_found: Mapping[Case, Found]) -> str:
    """Return a row of the table that grows."""
    start = f"| {case.family} | {case.side} | {case.batch} | {case.way.name} | "
    offs = " | ".join(_or_dash(off, ".1e") for off in (found.loss_off, found.gradient_off, found.fp32_off))
    if not found.seconds:
        return f"{start}{found.trouble or '-'} | - | - | - | {offs} |"
    ratio = ratio_to_base(case, all_found)
    time_and_share = f"{found.median:.4f} {found.trouble}".strip() + f" | {found.share:.1%}"
    return f"{start}{time_and_share} | {_or_dash(ratio, '.3f')} | {_or_dash(found.peak, '.2f')} | {offs} |"


def ratio_to_base(case: Case, all_found: Mapping[Case, Found]) -> float | None:
    """Return the time over that of the way that a way is compared with; None if one was not timed."""
    bases = [f for c, f in all_found.items() if c.place == case.place and c.way.name == case.way.base]
    if not bases or not bases[0].seconds:
        return None
    return all_found[case].median / bases[0].median


def tables(all_found: Mapping[Case, Found]) -> str:
    """Return a table for each family: ways, and what each takes at each size."""
    parts = []
    for family in dict.fromkeys(case.family for case in all_found):
        mine = {case: found for case, found in all_found.items() if case.family == family}
        places = list(dict.fromkeys(case.place for case in mine))
        heads = " | ".join(f"{side} px, batch {batch}" for _, side, batch in places)
        rows = [f"{family}: s/step, share of the matmul rate, GiB\n", f"| | {heads} |"]
        rows.append("| --- |" + " --- |" * len(places))
        for name in dict.fromkeys(case.way.name for case in mine if case.way.timed):
            cells = {case.place: _cell(found) for case, found in mine.items() if case.way.name == name}
            rows.append(f"| {name} | " + " | ".join(cells.get(place, "") for place in places) + " |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _cell(found: Found) -> str:
    if not found.seconds:
        return found.trouble.partition(":")[0]
    peak = "" if found.peak is None else f", {found.peak:.1f}"
    off = " (loss is off)" if found.failed else ""
    return f"{found.median:.3f}, {found.share:.0%}{peak}{off}"


def results(all_found: Mapping[Case, Found], machine: str, rate: float) -> list[Result]:
    """Return the figures as report.py keeps them: times, peaks and losses at each size, over the first's."""
    kept = []
    for place in dict.fromkeys(case.place for case in all_found):
        mine = {case.way.name: found for case, found in all_found.items() if case.place == place}
        kinds = {
            "device s": {name: found.seconds for name, found in mine.items()},
            "GiB": {name: () if found.peak is None else (found.peak,) for name, found in mine.items()},
            "loss": {name: () if found.loss is None else (found.loss,) for name, found in mine.items()},
        }
        for unit, figures in kinds.items():
            there = {name: given for name, given in figures.items() if given}
            if not there:
                continue
            first = statistics.median(next(iter(there.values())))
            rows = [_row(name, given, first) for name, given in there.items()]
            title = f"{unit}: {place[0]}, {place[1]} px, batch {place[2]}, {machine}"
            kept.append(Result(title, unit, rows, rate / 1e9, max(map(len, there.values())), "bf16"))
    return kept


def _row(name: str, figures: Sequence[float], first: float) -> Row:
    middle = statistics.median(figures)
    return Row(name, middle, middle / first, min(figures) / first, max(figures) / first)


def _or_dash(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)
