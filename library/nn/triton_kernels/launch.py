"""What our Triton kernels share: how they are launched, and how packed rows are dealt out to programs.

Rows of a packed batch are dealt out sample by sample: program (tile, sample) takes the tile-th few rows of
its sample, so all of them have the same gain. Samples have different lengths, and programs beyond the end of
theirs find nothing to do. A sum over a sample's rows is made in two steps whose order is fixed, because the
same step must give the same bits: each program adds up its own rows, and torch adds up the programs.

Triton reads TRITON_INTERPRET when a kernel is defined: with 1, kernels run on the CPU in its interpreter,
which is how the tests run them.

Shape legend: T packed tokens, B samples, D features, N tiles.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from library.nn.packing import Packing

_ELEMENTS_A_WARP = 512  # 16 a thread


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], *inputs: object, **constants: object) -> None:
    """Run a kernel on the device of its first input, a tensor. On the meta device there is nothing to do."""
    first = inputs[0]
    if first.is_meta or 0 in grid:
        return
    with torch.cuda.device_of(first):  # Triton launches on the current one
        kernel[grid](*inputs, enable_fp_fusion=True, **constants)  # Triton is about to change the default


@functools.cache  # a launch takes tens of microseconds, and Triton's own arithmetic is slow when called
def row_shape(width: int) -> dict[str, int]:
    """Return the constants of a kernel that takes a row at once: WIDTH, BLOCK and how many warps do it."""
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": min(max(block // _ELEMENTS_A_WARP, 1), 16)}


def tiles(packing: Packing, rows: int) -> tuple[int, int]:
    """Return the grid of a kernel whose programs take `rows` rows of a sample each."""
    return parts(max(packing.lengths, default=0), rows), len(packing.lengths)


def parts(count: int, size: int) -> int:
    """Return how many parts of this size are needed for so many; the last one may be smaller."""
    return -(-count // size)


def sums_of_tiles(grid: tuple[int, int], rows_BD: Tensor) -> Tensor:
    """Return room for what each program adds up, (B, N, D) in fp32."""
    count, samples = grid
    return rows_BD.new_empty(samples, count, rows_BD.shape[1], dtype=torch.float32)


def added_up(sums_BND: Tensor | None, rows_BD: Tensor) -> Tensor | None:
    """Return the gradient of `rows_BD`, one row a sample or a single one, from what the programs added up."""
    if sums_BND is None:
        return None
    if len(rows_BD) == 1:
        return sums_BND.sum((0, 1)).unsqueeze(0)
    return sums_BND.sum(1)


def rows_apart(x: Tensor) -> Tensor:
    """Return x with neighbouring features side by side in memory, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def sample_stride(rows_BD: Tensor) -> int:
    """Return how far apart the rows of two samples are: 0 if all have the same."""
    return 0 if len(rows_BD) == 1 else rows_BD.stride(0)


@triton.jit
def rows_of_program(ends_ptr, ROWS: tl.constexpr):
    """The first row of this program and the one after its last, in 64 bits: a batch may be that large."""
    sample = tl.program_id(1)
    first = tl.load(ends_ptr + sample).to(tl.int64) + tl.program_id(0) * ROWS
    return first, tl.minimum(first + ROWS, tl.load(ends_ptr + sample + 1).to(tl.int64))
