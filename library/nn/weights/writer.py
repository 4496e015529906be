"""A model's weights to a file, tensor by tensor: in memory is never more than one that is converted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.core.checkpoint_writer import CheckpointPlan, PlannedTensor
from library.core.files import require_room, staged_directory
from library.core.weight_layout import FileTensor, WeightLayout
from library.nn.weights.reader import DTYPES

# Inside diffusers' folder of a pipeline.
MODEL_FOLDER = "transformer"
MODEL_WEIGHTS, MODEL_CONFIG = "diffusion_pytorch_model.safetensors", "config.json"

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Check = Callable[[str, Tensor], None]


class WeightFile:
    """Writes the weights of a model as its layout says.

    Args:
        layout: as the model's family has it.
        tensor_of: returns a parameter by its name in the model, on any device. It is asked once for each
            tensor of the file that is made of it, and its answer is let go when that is written.
        dtype: of the tensors in the file, or a rule from a parameter's name to it.
    """

    def __init__(
        self,
        layout: WeightLayout,
        tensor_of: Callable[[str], Tensor],
        dtype: Callable[[str], torch.dtype] | torch.dtype,
    ) -> None:
        self._layout = layout
        self._tensor_of = tensor_of
        self._dtype = dtype
        self._tensors = {tensor.name: tensor for tensor in layout.tensors}
        self._of_unread = next(t.parameter for t in layout.tensors if t.parameter is not None)

    def write(
        self, path: Path, metadata: Mapping[str, str], *, check: Check | None = None, advice: str = ""
    ) -> None:
        """Write the weights as they are now; what was at `path` stays there on any failure.

        Args:
            path: of the file; for diffusers of the folder, which gets the model in `transformer`.
            check: is given every tensor by its name in the file, as it will be written, and raises if that
                must not be.
            advice: last sentence of the message that there is no room.

        Raises:
            StorageError: there is no room, or the operating system refused a write.
            Whatever `check` raises.
        """
        plan = CheckpointPlan(self._planned(), {"format": "pt", **self._layout.settings, **metadata})
        require_room(path, plan.size, advice)

        def content(name: str) -> memoryview:
            tensor = self._stored(self._tensors[name])
            if check is not None:
                check(name, tensor)
            return bytes_of(tensor)

        if self._layout.config is None:
            plan.write(path, content)
            return
        with staged_directory(path) as staging:
            folder = staging / MODEL_FOLDER
            folder.mkdir()
            with open(folder / MODEL_WEIGHTS, "wb") as handle:
                plan.write_to(handle, content)
            text = json.dumps(self._layout.config, indent=2) + "\n"
            (folder / MODEL_CONFIG).write_text(text, encoding="utf-8")

    def _planned(self) -> Iterator[PlannedTensor]:
        for tensor in self._layout.tensors:
            yield PlannedTensor(tensor.name, _NAMES[self._dtype_of(tensor)], tensor.shape)

    def _stored(self, tensor: FileTensor) -> Tensor:
        """Return a tensor as the file will have it, wherever it lies."""
        if tensor.parameter is None:
            return torch.ones(tensor.shape, dtype=self._dtype_of(tensor))
        whole = self._tensor_of(tensor.parameter).detach()
        part = whole.narrow(0, tensor.first_row, tensor.shape[0])
        assert part.shape == tensor.shape, f"'{tensor.name}' has the shape {tuple(part.shape)}"
        return part.to(self._dtype_of(tensor))

    def _dtype_of(self, tensor: FileTensor) -> torch.dtype:
        if isinstance(self._dtype, torch.dtype):
            return self._dtype
        return self._dtype(tensor.parameter or self._of_unread)


def plan_of(tensors: Mapping[str, Tensor]) -> CheckpointPlan:
    """Return the plan of a file with these tensors as they are."""
    planned = (PlannedTensor(name, _NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items())
    return CheckpointPlan(planned, {})


def bytes_of(tensor: Tensor) -> memoryview:
    """Return what a file has of a tensor; if that lies in order on the CPU, it is no copy."""
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
