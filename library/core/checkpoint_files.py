"""What weight files hold, read from their headers: names, shapes, dtypes, metadata. No tensor is loaded.

A checkpoint may be one `.safetensors` file, a folder with one or several of them, or a sharded
`*.index.json`. Pickled files (`.ckpt`, `.pt`, `.bin`) are refused: unpickling runs whatever code the file
contains.

Weights in fp8 with scales, as ComfyUI has them, look like any others here. Beside `<layer>.weight` such a
file has `<layer>.scale_weight`, in newer ones `<layer>.weight_scale`: fp32, one number or one an output row.
What it has about activations, and marks of what it is, are left out.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from library.core.errors import CheckpointError
from library.core.files import explain

_INDEX = ".safetensors.index.json"
_SCALE = re.compile(r"(.+)\.(scale_weight|weight_scale)")
_OF_FP8 = re.compile(r".+\.(scale_weight|weight_scale|scale_input|input_scale|comfy_quant)|(.+\.)?scaled_fp8")
_FP8 = {"F8_E4M3", "F8_E5M2"}
_PICKLED = {".ckpt", ".pt", ".pth", ".bin"}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is. `name` is its key inside `file`.

    scale: what the stored numbers are to be multiplied by: one number, or one for each of the first
    dimension.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: TensorInfo | None = None


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by name, with the safetensors metadata and the config.json beside them."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, sorted."""
        scales = (info.scale for info in self.tensors.values() if info.scale is not None)
        return tuple(sorted({info.file for info in (*self.tensors.values(), *scales)}))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; a missing name is a KeyError, which callers prevent by detecting the
        format."""
        return self.tensors[name].shape

    def with_prefix_stripped(self, prefix: str) -> Checkpoint:
        """Return the part whose names begin with `prefix`, named without it."""
        kept = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
        return Checkpoint(self.path, kept, self.metadata, self.config)


_ENDINGS = (".safetensors", ".sft", ".json", ".gguf", ".pt", ".pth", ".ckpt", ".bin", ".model")  # of files


def _of_the_hub(path: Path) -> str:
    """Return what to do if a path looks like the name of a repository on the hub."""
    names_file = path.suffix in _ENDINGS or path.parts[:1] == ("~",)
    if path.is_absolute() or len(path.parts) != 2 or path.parent.exists() or names_file:
        return ""
    return (
        f" If that is a repository on the Hugging Face hub, run `hf download {path.as_posix()} --local-dir "
        f"{path.name}` and give that folder: models are not downloaded here."
    )


def open_checkpoint(path: Path, subfolder: str | None = None) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        path: a `.safetensors` file, a `*.safetensors.index.json`, or a folder that holds either.
        subfolder: looked into first when `path` is a folder that has it (diffusers: "transformer").

    Raises:
        CheckpointError: nothing there, not a safetensors file, truncated, a shard is missing, a name
        occurs twice.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"There is no weight file or folder {path}.{_of_the_hub(path)}")
    if path.is_dir():
        folder = path / subfolder if subfolder and (path / subfolder).is_dir() else path
        files = _files_of_folder(folder)
    elif path.name.endswith(".index.json"):
        folder, files = path.parent, _files_of_index(path)
    else:
        folder, files = path.parent, [path]
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in files:
        shard, shard_metadata = _read_header(file)
        doubled = tensors.keys() & shard.keys()
        if doubled:
            raise CheckpointError(
                f"{folder} holds the tensor '{min(doubled)}' in more than one file; keep one of them."
            )
        tensors |= shard
        metadata |= shard_metadata
    return Checkpoint(path, _with_scales(path, tensors), metadata, _read_config(folder))


def _with_scales(path: Path, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Put the scales of weights in fp8 to their weights.

    Raises CheckpointError for scales of another kind.
    """
    scales = {match[1]: info for name, info in tensors.items() if (match := _SCALE.fullmatch(name))}
    if not scales:
        return tensors
    kept = {name: info for name, info in tensors.items() if not _OF_FP8.fullmatch(name)}
    for layer, scale in scales.items():
        name = f"{layer}.weight"
        weight = kept.get(name)
        if weight is None or weight.dtype not in _FP8 or prod(scale.shape) not in (1, weight.shape[0]):
            what = "no weight" if weight is None else f"a weight {weight.shape} in {weight.dtype}"
            raise CheckpointError(
                f"{path}: '{scale.name}' of shape {scale.shape} belongs to {what}. Only weights in fp8 with "
                f"one scale, or one for each output row, can be read; take a file in bf16."
            )
        kept[name] = replace(weight, scale=scale)
    return kept


def _files_of_folder(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob("*" + _INDEX))
    if len(indexes) > 1:
        names = ", ".join(i.name for i in indexes)
        raise CheckpointError(
            f"{folder} holds several sharded checkpoints ({names}); name one of the index files."
        )
    if indexes:
        return _files_of_index(indexes[0])
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors file.")
    if len(files) > 1 and not all("-of-" in f.name for f in files):
        names = ", ".join(f.name for f in files)
        raise CheckpointError(f"{folder} holds several weight files ({names}); name the one you mean.")
    return files


def _files_of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not a readable safetensors index: {error}.") from error
    files = [index.parent / Path(name).name for name in names]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise CheckpointError(f"{index} lists files that are not there: {', '.join(missing)}.")
    return files


def _read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    if file.suffix.lower() in _PICKLED:
        raise CheckpointError(
            f"{file} is a pickled file, which can run code when loaded; convert it to .safetensors and "
            f"name that file."
        )
    try:
        with safe_open(file, framework="np") as handle:
            tensors = {}
            for name in handle.keys():
                part = handle.get_slice(name)
                tensors[name] = TensorInfo(file, name, tuple(part.get_shape()), part.get_dtype())
            return tensors, dict(handle.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is not a complete safetensors file ({_size(file)}): it is truncated, damaged or of "
            f"another format ({str(error).rstrip('.')}). Download or copy it again."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {explain(error)}.") from error


def _read_config(folder: Path) -> dict[str, object]:
    """config.json beside the weights, where there is one; a broken one is an error, not a guess."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}.") from error
    return content if isinstance(content, dict) else {}


def _size(file: Path) -> str:
    return f"{file.stat().st_size:,} bytes"
