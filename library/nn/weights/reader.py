"""Tensors out of safetensors files, in the dtype and on the device where they are wanted.

Three ways. What is wanted on the CPU in the file's own dtype stays a view of the memory-mapped file: nothing
is read until it is used. Everything else goes in pieces into the tensor that was asked for, so that, however
large a tensor is, next to the result there is only one piece a reader in memory:

- wanted on the CPU in another dtype, a piece of the file is mapped, converted from there, and unmapped again.
  Reading it would be one copy more, and all of the file, mapped, would stay beside the converted weights;
- otherwise, or where files are not to be mapped, a piece is read, and converted or copied on from there.

Readers are threads: reading, converting and copying to a device let the interpreter go. Each converts alone,
in parts so small that torch does not begin a team of threads for every one of them.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence
from contextlib import ExitStack
from io import FileIO
from math import prod
from pathlib import Path
from threading import local

import torch
from safetensors import safe_open
from torch import Tensor

from library.core.checkpoint_files import TensorInfo
from library.core.errors import CheckpointError
from library.core.files import explain

READERS = min(4, os.cpu_count() or 1)
PIECE_BYTES = 2 * 2**20  # small enough to still be in the processor's cache when it is converted

_MAPPED_PIECES = 4  # as many are mapped at once: mapping and unmapping take their time
_ALONE = 32_000  # numbers; torch shares out the work on 2^15 and more

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}


class TensorReader:
    """Reads tensors of some safetensors files. `read` may be called by several threads at once.

    mmap: leave what needs no conversion in the file; else everything is read.
    """

    def __init__(self, files: Sequence[Path], *, mmap: bool = True) -> None:
        self._files = files
        self._mmap = mmap
        self._stack = ExitStack()
        self._mapped: dict[Path, safe_open] = {}
        self._starts: dict[Path, dict[str, int]] = {}
        self._pieces = local()

    def __enter__(self) -> TensorReader:
        for file in self._files:
            self._starts[file] = _starts(file)
            if self._mmap:
                self._mapped[file] = self._stack.enter_context(safe_open(file, "pt", device="cpu"))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def read(
        self,
        parts: Sequence[TensorInfo],
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        mapped: bool = True,
    ) -> Tensor:
        """Return tensors of the same dtype, joined along dim 0 when there are several.

        Args:
            dtype: None keeps the file's; of numbers with a scale it is bf16.
            mapped: whether the result may be a view of the file.

        Raises:
            CheckpointError: a file ends too early, cannot be read, or holds numbers of an unknown kind.
        """
        stored, scaled = dtype_of(parts[0]), any(part.scale for part in parts)
        dtype = dtype or (torch.bfloat16 if scaled else stored)
        as_stored = len(parts) == 1 and device.type == "cpu" and dtype == stored and not scaled
        if mapped and self._mmap and as_stored:
            return self._mapped[parts[0].file].get_tensor(parts[0].name)
        tensor = torch.empty(joined_shape(parts), dtype=dtype, device=device)
        if device.type != "meta":
            rest = tensor.view(-1)
            for part in parts:
                count = prod(part.shape)
                self._fill(rest[:count], part)
                if part.scale is not None:
                    self._multiply(rest[:count], part)
                rest = rest[count:]
        return tensor

    def _multiply(self, target_N: Tensor, part: TensorInfo) -> None:
        """Multiply what was read of a tensor by its scale, or its rows each by their own."""
        scale = self.read([part.scale], device=target_N.device, dtype=torch.float32)
        target_N.view(scale.numel(), -1).mul_(scale.view(-1, 1))

    def _fill(self, target_N: Tensor, part: TensorInfo) -> None:
        """Read one tensor of a file into memory that is there for it."""
        stored = dtype_of(part)
        try:
            with open(part.file, "rb", buffering=0) as file:
                file.seek(self._starts[part.file][part.name])
                if target_N.dtype == stored and target_N.device.type == "cpu":
                    _read_into(file, target_N)
                    return
                if target_N.device.type == "cpu" and self._mmap and file.tell() % stored.itemsize == 0:
                    _map_into(file, stored, target_N)
                    return
                piece = self._piece(pinned=target_N.device.type == "cuda").view(stored)
                for wanted in target_N.split(len(piece)):
                    _read_into(file, piece[: len(wanted)])
                    _convert(wanted, piece[: len(wanted)])
        except EOFError as error:
            raise CheckpointError(
                f"{part.file} ends in the middle of '{part.name}': it was cut since the run began, or is "
                f"still being written. Copy it again."
            ) from error
        except OSError as error:
            raise CheckpointError(f"{part.file} cannot be read: {explain(error)}.") from error

    def _piece(self, *, pinned: bool) -> Tensor:
        """Return this thread's memory for what is on its way; pinned for what goes on to a GPU."""
        pieces = self._pieces.__dict__
        if pinned not in pieces:
            pieces[pinned] = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=pinned)
        return pieces[pinned]


def dtype_of(part: TensorInfo) -> torch.dtype:
    """Return the torch dtype of a stored tensor. Raises CheckpointError for one that torch has not."""
    if part.dtype not in DTYPES:
        raise CheckpointError(
            f"{part.file}: '{part.name}' is stored as {part.dtype}, which cannot be read; take a file in "
            f"bf16, fp16 or fp32."
        )
    return DTYPES[part.dtype]


def joined_shape(parts: Sequence[TensorInfo]) -> tuple[int, ...]:
    """Return the shape of tensors joined along dim 0."""
    if len(parts) == 1:
        return parts[0].shape
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])


def _starts(file: Path) -> dict[str, int]:
    """Return where in the file the bytes of each tensor begin."""
    try:
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read any more: {error}.") from error
    header.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}


def _read_into(file: FileIO, target_N: Tensor) -> None:
    """Fill a CPU tensor with the next bytes of an unbuffered file. Raises EOFError when they run out."""
    view = memoryview(target_N.view(torch.uint8).numpy())
    while view:
        count = file.readinto(view)
        if not count:
            raise EOFError
        view = view[count:]


def _map_into(file: FileIO, stored: torch.dtype, target_N: Tensor) -> None:
    """Fill a CPU tensor with the next numbers of a file, which are converted. Raises EOFError if it ends."""
    begin, size = file.tell(), os.fstat(file.fileno()).st_size
    for wanted in target_N.split(_MAPPED_PIECES * PIECE_BYTES // stored.itemsize):
        skipped, length = begin % mmap.ALLOCATIONGRANULARITY, len(wanted) * stored.itemsize
        if begin + length > size:
            raise EOFError
        # A copy on write, which nobody writes to: torch warns of memory that cannot be written.
        place = {"length": skipped + length, "offset": begin - skipped}
        page = mmap.mmap(file.fileno(), access=mmap.ACCESS_COPY, **place)  # until the tensor on it goes
        _convert(wanted, torch.frombuffer(page, dtype=stored, count=len(wanted), offset=skipped))
        begin += length


def _convert(target_N: Tensor, source_N: Tensor) -> None:
    """Copy from one dtype or device to another; between CPU tensors by this thread alone."""
    if target_N.device.type == "cuda" and target_N.dtype != source_N.dtype:
        source_N = source_N.to(target_N.device)  # where it is converted; here a team of threads would do it
    if target_N.device.type != "cpu":
        target_N.copy_(source_N)
        return
    for into, numbers in zip(target_N.split(_ALONE), source_N.split(_ALONE), strict=True):
        into.copy_(numbers)
