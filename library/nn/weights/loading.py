"""Weights from safetensors files into a module that was built on the meta device.

Each tensor goes from the file to its device and dtype on its own, several at a time, so there is never a
second full copy in RAM; on the CPU, in the file's own dtype, it stays a view of the memory-mapped file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.core.ahead import map_ahead
from library.core.checkpoint_files import Checkpoint
from library.core.errors import CheckpointError
from library.core.log import logger
from library.core.suggest import did_you_mean
from library.nn.weights.quant import QuantLinear, quant_layers
from library.nn.weights.reader import READERS, TensorReader, joined_shape


@dataclass(frozen=True)
class Source:
    """How a parameter is made from the checkpoint: the named tensors, joined along dim 0 when there are
    several."""

    names: tuple[str, ...]


_log = logger("weights")

DtypeRule = Callable[[str], torch.dtype | None]
DeviceRule = Callable[[str], torch.device]


def load_module(
    module: nn.Module,
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    *,
    device: DeviceRule | torch.device,
    dtype: DtypeRule | torch.dtype | None = None,
    mmap: bool = True,
    quantise_on: torch.device | str | None = None,
) -> None:
    """Fill every parameter and buffer of `module` (on meta) from `checkpoint`.

    Quantised layers are filled with what the checkpoint has stored for them, or their weight is quantised.

    Args:
        sources: for each parameter name of the module, where it comes from; of a quantised layer, for
            its weight if that is yet to be quantised.
        device: where the weights go, or a rule from parameter name to device.
        dtype: target dtype, or a rule from parameter name to dtype; None keeps the file's dtype.
        mmap: map the files into memory where nothing needs converting; else read them, which some network
            disks are faster at.
        quantise_on: where the weights of quantised layers are quantised; None: where they go.

    Raises:
        CheckpointError: a parameter without a source, a tensor missing from the file, or a shape that
        differs.
    """
    quantised = {name: layer for name, layer in quant_layers(module).items() if name in sources}
    targets = _targets(module, quantised)
    errors: dict[str, float] = {}
    check_complete(checkpoint, targets, sources)
    for name, target in targets.items():
        _check_shape(checkpoint, sources[name], target)

    def place_of(name: str) -> torch.device:
        return device if isinstance(device, torch.device) else device(name)

    def read(name: str) -> Tensor:
        parts = [checkpoint.tensors[part] for part in sources[name].names]
        if name in quantised:
            return reader.read(parts, device=torch.device(quantise_on or place_of(name)), mapped=False)
        wanted = dtype(name) if callable(dtype) else dtype
        return reader.read(parts, device=place_of(name), dtype=wanted)

    tensors = map_ahead(read, targets, threads=READERS, ahead=2 * READERS)
    with TensorReader(checkpoint.files, mmap=mmap) as reader, closing(tensors):
        for (name, target), tensor in zip(targets.items(), tensors, strict=True):
            if name in quantised:
                error = quantised[name].quantise(tensor, place_of(name))
                if not tensor.is_meta:
                    errors[name] = error
            else:
                _assign(module, name, tensor.view(target.shape))
    if errors:
        worst = max(errors, key=errors.__getitem__)
        mean = sum(errors.values()) / len(errors)
        _log.info(
            "quantised %d layers; relative error of their weights %.2f %%, at most %.2f %% (%s)",
            *(len(errors), 100 * mean, 100 * errors[worst], worst),
        )


def _targets(module: nn.Module, quantised: Mapping[str, QuantLinear]) -> dict[str, Tensor]:
    """Return what is to be filled, by name: parameters, buffers, and the weights that are quantised here."""
    stored = {id(tensor) for layer in quantised.values() for tensor in layer.stored}
    targets = {
        name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if id(tensor) not in stored
    }
    for name, layer in quantised.items():
        targets[name] = torch.empty(layer.out_features, layer.in_features, device="meta")
    return targets


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


def _check_shape(checkpoint: Checkpoint, source: Source, target: Tensor) -> None:
    """Raise CheckpointError unless the source has the target's shape; a matrix does for a 1x1 convolution."""
    shape, wanted = joined_shape([checkpoint.tensors[name] for name in source.names]), tuple(target.shape)
    if wanted not in (shape, (*shape, 1, 1)):
        raise CheckpointError(
            f"{checkpoint.path}: '{' + '.join(source.names)}' has shape {shape}, but the model needs "
            f"{wanted}."
        )


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` where the meta parameter or buffer `name` was; weights come in frozen."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
