"""What the weight file of a model looks like: its tensors, and what of the model each is. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a weight file: rows of one of the model's parameters.

    parameter: its name in the model; None for a tensor that must be there and that nobody reads. It is
        written as ones, in the dtype of the first parameter.
    first_row: the first of the parameter's rows; those of other file tensors come before it.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str | None
    first_row: int = 0


@dataclass(frozen=True)
class WeightLayout:
    """A file, or with `config` a folder as diffusers has it.

    settings: for the file's metadata: what the shapes of the tensors do not tell of the model.
    config: content of the folder's config.json.
    """

    tensors: tuple[FileTensor, ...]
    settings: Mapping[str, str]
    config: Mapping[str, object] | None = None
