"""Weights from memory-mapped safetensors files into a module that was built on the meta device.

Each tensor goes from the mapped file to its device and dtype on its own, so there is never a second full copy
in RAM; on the CPU, in the file's own dtype, it stays a view of the mapped file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor, nn

from library.core.checkpoint_files import Checkpoint
from library.core.errors import CheckpointError
from library.core.suggest import did_you_mean


@dataclass(frozen=True)
class Source:
    """How a parameter is made from the checkpoint: the named tensors, joined along dim 0 when there are
    several."""

    names: tuple[str, ...]


DtypeRule = Callable[[str], torch.dtype | None]


def load_module(
    module: nn.Module,
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    *,
    device: torch.device,
    dtype: DtypeRule | torch.dtype | None = None,
    mmap: bool = True,
) -> None:
    """Fill every parameter and buffer of `module` (on meta) from `checkpoint`.

    Args:
        sources: for each parameter name of the module, where it comes from.
        dtype: target dtype, or a rule from parameter name to dtype; None keeps the file's dtype.
        mmap: map the files into memory; else read them, which some network disks are faster at.

    Raises:
        CheckpointError: a parameter without a source, a tensor missing from the file, or a shape that
        differs.
    """
    targets = dict(module.state_dict(keep_vars=True))
    check_complete(checkpoint, targets, sources)
    with _TensorReader(mmap) as reader:
        for name, target in targets.items():
            tensor = _as_convolution(reader.read(checkpoint, sources[name]), target)
            if tensor.shape != target.shape:
                raise CheckpointError(
                    f"{checkpoint.path}: '{' + '.join(sources[name].names)}' has shape "
                    f"{tuple(tensor.shape)}, but the model needs {tuple(target.shape)}."
                )
            wanted = dtype(name) if callable(dtype) else dtype
            _assign(module, name, tensor.to(device=device, dtype=wanted or tensor.dtype))


def check_complete(checkpoint: Checkpoint, targets: Iterable[str], sources: Mapping[str, Source]) -> None:
    """Raise CheckpointError naming the parameters that the checkpoint does not provide."""
    absent = [n for n in targets if n not in sources]
    missing = absent + [k for s in sources.values() for k in s.names if k not in checkpoint.tensors]
    if missing:
        shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} tensors that the model needs: {shown}"
            f"{did_you_mean(missing[0], checkpoint.tensors)}"
        )


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """Read one tensor on the CPU, in the file's dtype."""
    with _TensorReader() as reader:
        return reader.read(checkpoint, Source((name,)))


class _TensorReader:
    """Keeps each file of a checkpoint open while tensors are read from it, memory-mapped or not."""

    def __init__(self, mmap: bool = True) -> None:
        self._mmap = mmap
        self._stack = ExitStack()
        self._open: dict[Path, safe_open | _PlainFile] = {}

    def __enter__(self) -> _TensorReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def read(self, checkpoint: Checkpoint, source: Source) -> Tensor:
        parts = [self._read_one(checkpoint, name) for name in source.names]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=0)

    def _read_one(self, checkpoint: Checkpoint, name: str) -> Tensor:
        info = checkpoint.tensors[name]
        if info.file not in self._open:
            mapped = self._mmap and safe_open(info.file, framework="pt", device="cpu")
            self._open[info.file] = self._stack.enter_context(mapped or _PlainFile(info.file))
        return self._open[info.file].get_tensor(info.name)


class _PlainFile:
    """A safetensors file whose tensors are read one by one, with ordinary reads."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")
        length = int.from_bytes(self._file.read(8), "little")
        self._header = json.loads(self._file.read(length))
        self._start = 8 + length

    def __enter__(self) -> _PlainFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def get_tensor(self, name: str) -> Tensor:
        """Read one tensor, as a file of its own: the package knows about dtypes, and this class does not."""
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        header = json.dumps({name: entry | {"data_offsets": [0, end - begin]}}).encode()
        self._file.seek(self._start + begin)
        return load(len(header).to_bytes(8, "little") + header + self._file.read(end - begin))[name]


def _as_convolution(tensor: Tensor, target: Tensor) -> Tensor:
    """Give a matrix the two trailing ones of a 1x1 convolution where the target is one."""
    is_matrix_of = tensor.ndim == 2 and target.ndim == 4 and target.shape[2:] == (1, 1)
    return tensor[:, :, None, None] if is_matrix_of else tensor


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` where the meta parameter or buffer `name` was; weights come in frozen."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
