"""Writing a weight file whose tensors come one by one, so that it is never in memory as a whole. No torch.

The safetensors format: the header's length in eight bytes, the header, which is JSON, padded with blanks to a
multiple of eight bytes, then the tensors without a gap. The header tells where each begins, so names, shapes
and dtypes must be known before the first number is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from library.core.files import atomic_write

_ALIGNMENT = 8  # bytes
_ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1},
}

Content = Callable[[str], bytes | memoryview]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that a file will have. `dtype` is safetensors' name for it, such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return _ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.item_bytes


class CheckpointPlan:
    """A weight file that is yet to be written.

    Tensors of larger numbers come first, else in the given order: so each begins where its numbers may be
    read in place.
    """

    def __init__(self, tensors: Iterable[PlannedTensor], metadata: Mapping[str, str]) -> None:
        self._tensors = sorted(tensors, key=lambda tensor: -tensor.item_bytes)
        self._header = _header(self._tensors, metadata)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self._header) + sum(tensor.nbytes for tensor in self._tensors)

    def write(self, path: Path, content: Content) -> None:
        """Write the file; as long as it is not whole, and on any failure, what was at `path` stays there.

        Args:
            content: returns the bytes of the tensor of a name. It is asked for one tensor after another, the
                next when the last one is written and let go.

        Raises:
            StorageError: the operating system refused a write (disk full, no permission).
            Whatever `content` raises.
        """
        with atomic_write(path) as handle:
            self.write_to(handle, content)

    def write_to(self, handle: BinaryIO, content: Content) -> None:
        """Write the file's content to an open file, see `write`. Raises OSError."""
        handle.write(self._header)
        for tensor in self._tensors:
            _write(handle, tensor, content(tensor.name))


def _write(handle: BinaryIO, tensor: PlannedTensor, content: bytes | memoryview) -> None:
    """Write a tensor. A function of its own, so that no name outlives the content."""
    found = memoryview(content).nbytes
    assert found == tensor.nbytes, f"'{tensor.name}' has {found} bytes instead of {tensor.nbytes}"
    handle.write(content)


def _header(tensors: Iterable[PlannedTensor], metadata: Mapping[str, str]) -> bytes:
    """Return length and header."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        assert tensor.name not in entries, f"'{tensor.name}' is planned twice"
        start, end = end, end + tensor.nbytes
        place = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
        entries[tensor.name] = place
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
