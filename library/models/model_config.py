"""Constants of a network that the shapes of its tensors do not tell: out of its config.json. No torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NoReturn

from library.core.checkpoint_files import Checkpoint
from library.core.errors import CheckpointError
from library.models.checkpoint_kind import require_tensors


def config_beside(checkpoint: Checkpoint, model_types: Collection[str]) -> dict[str, object]:
    """Return the config.json beside the weights, or its copy in the metadata, if it is of such a model.

    A config.json of another model, as in a folder with many files, is not believed.
    """
    candidates = (checkpoint.config, _json_object(checkpoint.metadata.get("config", "")))
    return next((values for values in candidates if values.get("model_type") in model_types), {})


def matrix_shape(checkpoint: Checkpoint, name: str, what: str) -> tuple[int, ...]:
    """Return a matrix's shape. Raises CheckpointError that `what` lacks it, or that it is no matrix."""
    shape = checkpoint.shape(name) if name in checkpoint.tensors else ()
    if len(shape) != 2:
        require_tensors(checkpoint, {name: (0, 0)}, what)
    return shape


class Constants:
    """Values of a configuration, checked as they are asked for."""

    def __init__(self, path: Path, values: Mapping[str, object]) -> None:
        """`path`: the weights, for messages."""
        self._path = path
        self._values = values

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise the CheckpointError for a value that will not do."""
        raise CheckpointError(f"config.json of {self._path}: {key} is {self._values[key]!r}; {why}.")

    def require(self, fixed: Mapping[str, object]) -> None:
        """Refuse values other than those that the network is built for."""
        for key, usual in fixed.items():
            if self._values.get(key, usual) != usual:
                self.refuse(key, f"only {usual!r} is supported")

    def number(self, key: str, default: float) -> float:
        """Return a number."""
        value = self._values.get(key, default)
        if not _is_number(value):
            raise CheckpointError(f"config.json of {self._path}: {key} is {value!r}, but must be a number.")
        return value

    def number_or_none(self, key: str, default: float) -> float | None:
        """Return a number, or None where the configuration says null."""
        return self.number(key, default) if self._values.get(key, default) is not None else None

    def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Return a list of integers."""
        value = self._values.get(key, default)
        if not isinstance(value, list | tuple) or not all(_is_number(item) for item in value):
            raise CheckpointError(
                f"config.json of {self._path}: {key} is {value!r}, but must be a list of numbers."
            )
        return tuple(int(item) for item in value)

    def listed(self, key: str) -> list[object]:
        """Return a list, empty where the configuration has none."""
        value = self._values.get(key)
        return value if isinstance(value, list) else []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _json_object(text: str) -> dict[str, object]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
