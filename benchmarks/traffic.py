"""What a block gives a GPU to multiply and to move: counted, without a GPU.

    python benchmarks/traffic.py                        # both families at their real width, 512 px
    python benchmarks/traffic.py --family lumina --details
    python benchmarks/traffic.py --tflops 790 --gigabytes 4800   # and the least time of a card of these rates

A GPU computes wide products and attention as fast as it can multiply. All else waits for its memory: norms,
rotations, gates, activations, sums, casts, and the thin products of LoRA matrices. So these bytes tell how
much of a step is not arithmetic.

Counted are the operations of forward and backward of one block (a step of a model with two, less a step of a
model with one), as `benchmarks/dispatch.py` counts them: of each the bytes of the tensors that it reads and
of those that it writes, whether a cache still holds them or not. A product is thin if one of its sizes is at
most 64. Of Triton's kernels each counts as one operation; none is run, which changes no count. Autocast of
the rivals follows its rules for the CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count  # noqa: E402

from benchmarks.dispatch import Kernels, as_on_a_gpu  # noqa: E402
from benchmarks.report import missing_packages  # noqa: E402
from benchmarks.step import FAMILIES  # noqa: E402
from benchmarks.step_parts import Contestant, Family, Settings, taking_part  # noqa: E402
from library.nn.kernels import replace_parts  # noqa: E402

_PRODUCTS = ("mm", "addmm", "addmm_")
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
_THIN = 64
_WRITE_ONLY = ("copy_", "fill_", "zero_")
_BLOCKS = {"lumina": "n_layers", "kandinsky5": "n_visual_blocks"}


@dataclass(frozen=True)
class Count:
    """What is multiplied in wide products and attention, and the bytes that all else reads and writes.

    wide_bytes: those that wide products and attention read and write. by_name: all else, and thin products.
    """

    flops: float
    wide_bytes: int
    by_name: Counter[str]

    def __sub__(self, other: Count) -> Count:
        by_name = Counter(self.by_name)
        by_name.subtract(other.by_name)
        return Count(self.flops - other.flops, self.wide_bytes - other.wide_bytes, by_name)

    @property
    def bytes(self) -> int:
        """Of all that is no arithmetic."""
        return self.by_name.total()


class Traffic(Kernels):
    """Counts, beside the operations called in its context, what they multiply and move."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.wide_bytes, self.bytes_by_name = 0.0, 0, Counter[str]()

    def __torch_dispatch__(
        self, operation: Any, types: Any, given: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        before = self.by_name.total()
        result = super().__torch_dispatch__(operation, types, given, named)
        if self.by_name.total() == before:
            return result  # no kernel
        moved, name = _moved(operation, (given, named or {}), result), operation.overloadpacket.__name__
        flops = _wide_flops(name, given)
        if flops:
            self.flops += flops
            self.wide_bytes += moved
        else:
            self.bytes_by_name[name] += moved
        return result

    def launch(self, kernel: Any, given: tuple[Any, ...]) -> None:
        """Count a Triton kernel, each of whose tensors is read or written once."""
        self.bytes_by_name[kernel.fn.__name__] += sum(_size(x) for x in _tensors(given))

    def count(self) -> Count:
        """Return what was counted."""
        return Count(self.flops, self.wide_bytes, Counter(self.bytes_by_name))


def _moved(operation: Any, given: Any, result: Any) -> int:
    made, read = _tensors(result), _tensors(given)
    if operation.overloadpacket.__name__ in _WRITE_ONLY or "out" in operation._overloadname:
        read = [x for x in read if all(_place(x) != _place(y) for y in made)]
    return sum(map(_size, made)) + sum(map(_size, read))


def _tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in a tree, each once."""
    return list({_place(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}.values())


def _place(x: Tensor) -> tuple[object, ...]:
    return x.data_ptr(), x.shape, x.stride()


def _size(x: Tensor) -> int:
    """Return the bytes of a tensor, without those that it only repeats."""
    numbers = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        numbers *= length if stride else 1
    return numbers * x.element_size()


def _wide_flops(name: str, given: tuple[Any, ...]) -> float:
    """Return the operations of a wide product or of attention; nothing for all else."""
    if name in _PRODUCTS:
        a, b = given[-2:]
        sizes = (*a.shape, b.shape[1])
        return 2.0 * sizes[0] * sizes[1] * sizes[2] if min(sizes) > _THIN else 0.0
    if name == _ATTENTION:
        return sdpa_flop_count(*(x.shape for x in given[:3]))
    if name == f"{_ATTENTION}_backward":
        return sdpa_backward_flop_count(*(x.shape for x in given[:4]))
    return 0.0


@contextmanager
def fused(traffic: Traffic) -> Iterator[None]:
    """Let ours ask for its Triton kernels, which are counted and not run."""
    from triton.runtime.jit import JITFunction

    theirs = JITFunction.run
    JITFunction.run = lambda self, *given, **named: traffic.launch(self, given)
    replace_parts("triton")
    try:
        yield
    finally:
        replace_parts("torch")
        JITFunction.run = theirs


def count_block(family: Family, make: type[Contestant], pixels: int, *, triton: bool = False) -> Count:
    """Return what one block of a contestant takes, forward and backward."""
    return _count_step(family, make, pixels, 2, triton) - _count_step(family, make, pixels, 1, triton)


def _count_step(family: Family, make: type[Contestant], pixels: int, blocks: int, triton: bool) -> Count:
    whole = family.sizes["full"]
    size = replace(whole, params=replace(whole.params, **{_BLOCKS[family.name]: blocks}), latent=pixels // 8)
    family = replace(family, sizes={"full": size})
    settings = Settings(family, "full", torch.bfloat16, 1, torch.device("cpu"), False)
    traffic = Traffic()
    with as_on_a_gpu(), torch.random.fork_rng():
        contestant, work = make(settings), family.work(settings)
        if make is family.contestants["ours"]:
            contestant.model.runner.keep("none")
        with traffic, fused(traffic) if triton else nullcontext():
            contestant.loss(work).backward()
    return traffic.count()


def measure(family: Family, pixels: int) -> dict[str, Count]:
    """Return what a block of each contestant takes; of ours by Triton, too, if that is installed."""
    found = {}
    for name, make in taking_part(family).items():
        found[name] = count_block(family, make, pixels)
        if name == "ours" and not missing_packages("triton"):
            found["ours, --fused_kernels triton"] = count_block(family, make, pixels, triton=True)
    return found


def show(found: dict[str, Count], rates: tuple[float, float] | None, *, details: bool) -> None:
    """Print a table. rates: TFLOP/s and GB/s of a card."""
    rival = found.get("diffusers", found["ours"])
    columns = ["", "GFLOP", "MB of wide products and attention", "MB of all else", "to diffusers"]
    columns += ["least ms", "to diffusers"] if rates else []
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    for name, count in found.items():
        cells = [
            name,
            f"{count.flops / 1e9:.0f}",
            f"{count.wide_bytes / 1e6:.0f}",
            f"{count.bytes / 1e6:.0f}",
        ]
        cells.append(f"{count.bytes / rival.bytes:.2f}")
        if rates:
            cells += [f"{_least(count, *rates):.2f}", f"{_least(count, *rates) / _least(rival, *rates):.2f}"]
        print(f"| {' | '.join(cells)} |")
    for name, count in found.items() if details else ():
        most = ", ".join(f"{moved / 1e6:.0f} {kernel}" for kernel, moved in count.by_name.most_common(20))
        print(f"\n{name}, MB: {most}")


def _least(count: Count, tflops: float, gigabytes: float) -> float:
    """Milliseconds for the arithmetic, and then for moving all else."""
    return count.flops / tflops / 1e9 + count.bytes / gigabytes / 1e6


def main() -> None:
    """Read the command line and count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--pixels", type=int, default=512, help="the side of the picture")
    parser.add_argument("--details", action="store_true", help="which operations move how much")
    parser.add_argument("--tflops", type=float, help="rate of a card's bf16 products")
    parser.add_argument("--gigabytes", type=float, help="rate of its memory, GB/s")
    given = parser.parse_args()
    if (given.tflops is None) != (given.gigabytes is None):
        parser.error("--tflops and --gigabytes belong together")
    rates = None if given.tflops is None else (given.tflops, given.gigabytes)
    for name in given.family:
        print(f"\n{name}, {given.pixels} px, one picture, bf16: a block, forward and backward\n")
        show(measure(FAMILIES[name], given.pixels), rates, details=given.details)


if __name__ == "__main__":
    main()
