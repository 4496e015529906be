"""What a step costs the processor beside the arithmetic: Python, autograd and torch's own way to a kernel.

    python benchmarks/dispatch.py                        # both families, with and without checkpointing
    python benchmarks/dispatch.py --family lumina --rounds 20 --dtype bf16

A GPU is busy only as long as the processor gives it kernels faster than it computes them. So the models here
have as many blocks as the real ones and are tiny otherwise (64 features, a few tokens): what is left of a
step's processor time on one thread is what has to be done for every step whatever its size. Forward and
backward, without the optimizer; steps of all take turns; medians of CPU time.

Ours is computed as on a GPU (`as_on_a_gpu`), and so are the rivals but for what torch itself chooses: an RMS
norm, one kernel on a GPU, is a dozen operations on the CPU, and a layer norm, one kernel on both, stands in.

Kernels: operations that would be one on a GPU. Views and fresh memory are none. What one operation takes
several for (a sum of many numbers) is not known here, and counts once. With --dtype bf16 the casts that a
GPU's run has are there; the times are then those of this processor's bf16 products, too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from benchmarks.report import Result, add_arguments, matmul_gflops, show, summarise, write  # noqa: E402
from benchmarks.step import FAMILIES  # noqa: E402
from benchmarks.step_parts import Contestant, Settings, taking_part  # noqa: E402
from library.nn import stand_in  # noqa: E402
from library.nn.running.runner import MODES  # noqa: E402

_NO_KERNELS = (
    "empty",
    "new_empty",
    "_unsafe_view",
    "_reshape_alias",
    "detach",
    "lift_fresh",
    "_local_scalar",
)
_UNCOUNTED = 2  # first rounds


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let tensors of the CPU be computed as ours are on a GPU, and RMS norms by one operation each way."""
    real_kind, real_norm = stand_in.device_kind, F.rms_norm
    users = [module for module in list(sys.modules.values()) if _uses(module, real_kind)]
    for module in users:
        module.device_kind = lambda x: "cuda"
    F.rms_norm = _one_operation
    try:
        yield
    finally:
        F.rms_norm = real_norm
        for module in users:
            module.device_kind = real_kind


def _uses(module: Any, function: Callable[[Tensor], str]) -> bool:
    return getattr(module, "__dict__", {}).get("device_kind") is function


def _one_operation(
    x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    weight = None if weight is None else weight.to(x.dtype)  # torch's kernel on the CPU takes no other
    return F.layer_norm(x, shape, weight, None, 1e-6 if eps is None else eps)


class Kernels(TorchDispatchMode):
    """Counts the operations that are called in its context and would each be a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operation: Any, types: Any, given: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*given, **(named or {}))
        name = operation.overloadpacket.__name__
        makes = any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
        if makes and not operation.is_view and not name.startswith(_NO_KERNELS):
            self.by_name[name] += 1
        return result


@dataclass
class Turn:
    """A way to make a step, and what was found of it: seconds of each round, and operations of one."""

    contestant: Contestant
    work: object
    mode: str | None
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    kernels: tuple[int, int] = (0, 0)
    by_name: Counter[str] = field(default_factory=Counter)

    def take(self, *, counted: bool) -> None:
        """Make a step, and note its times if they count."""
        self._prepare()
        begin = time.process_time()
        loss = self.contestant.loss(self.work)
        middle = time.process_time()
        loss.backward()
        end = time.process_time()
        if counted:
            self.forward.append(middle - begin)
            self.backward.append(end - middle)

    def count(self) -> None:
        """Count operations."""
        self._prepare()
        with Kernels() as kernels:
            loss = self.contestant.loss(self.work)
            forward = kernels.by_name.total()
            loss.backward()
        self.kernels, self.by_name = (forward, kernels.by_name.total() - forward), kernels.by_name

    def _prepare(self) -> None:
        if self.mode is not None:
            self.contestant.model.runner.keep(self.mode)
        for weight in self.contestant.trained:
            weight.grad = None  # as the optimizer leaves it


def turns(settings: Settings, modes: list[str]) -> dict[str, Turn]:
    """Make all that take part. Ours takes a turn in every mode."""
    work, found = settings.family.work(settings), {}
    for name, make in taking_part(settings.family).items():
        if name == "ours":
            ours = make(settings)
            found |= {f"ours, {mode}": Turn(ours, work, mode) for mode in modes}
            continue
        for checkpointing in (False, True):
            rival = make(replace(settings, checkpointing=checkpointing))
            found[f"{name}, checkpointing" if checkpointing else name] = Turn(rival, work, None)
    return found


def measure(settings: Settings, rounds: int, modes: list[str], *, details: bool) -> Result:
    """Print the table of a family, and return the times of whole steps."""
    with as_on_a_gpu():
        found = turns(settings, modes)
        rates = []
        for number in range(rounds + _UNCOUNTED):
            rates.append(matmul_gflops())
            for turn in found.values():
                turn.take(counted=number >= _UNCOUNTED)
        for turn in found.values():
            turn.count()
    blocks = len(next(iter(found.values())).contestant.model.runner.blocks)
    print(f"\n{settings}, {blocks} blocks: CPU ms and kernels, medians of {rounds} rounds\n")
    print("| | forward | backward | a block | kernels forward | backward | a block |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, turn in found.items():
        forward, backward = (statistics.median(part) * 1e3 for part in (turn.forward, turn.backward))
        print(
            f"| {name} | {forward:.1f} | {backward:.1f} | {(forward + backward) / blocks:.2f} "
            f"| {turn.kernels[0]} | {turn.kernels[1]} | {sum(turn.kernels) / blocks:.0f} |"
        )
    if details:
        for name, turn in found.items():
            often = ", ".join(f"{count} {kernel}" for kernel, count in turn.by_name.most_common(20))
            print(f"\n{name}: {often}")
    whole = {
        name: [sum(pair) for pair in zip(turn.forward, turn.backward, strict=True)]
        for name, turn in found.items()
    }
    rival = next((name for name in found if not name.startswith("ours")), next(iter(found)))
    result = summarise(f"Dispatch of a step: {settings}", whole, rival, statistics.median(rates), "CPU s")
    show(result, "dispatch")
    return result


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--modes", nargs="+", choices=MODES[:-1], default=["none", "selective", "outputs", "full"]
    )
    parser.add_argument("--details", action="store_true", help="which operations, and how often")
    add_arguments(parser, rounds=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[given.dtype]
    results = []
    for name in given.family:
        settings = Settings(FAMILIES[name], "tiny", dtype, given.batch, torch.device("cpu"), False)
        results.append(measure(settings, given.rounds, given.modes, details=given.details))
    write(results, given.json)


if __name__ == "__main__":
    main()
