"""Settings of a network that the shapes of its tensors do not tell. No torch.

Transformers and text encoders of Hugging Face have them in a config.json beside the weights; single files
have them in their metadata, if at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
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


def read_settings(checkpoint: Checkpoint, is_ours: Callable[[Mapping[str, object]], bool]) -> Settings:
    """Return the settings in the metadata, then those of a config.json that `is_ours`."""
    values = dict(checkpoint.config) if is_ours(checkpoint.config) else {}
    for key, text in checkpoint.metadata.items():
        try:
            value = json.loads(text)
        except ValueError:
            continue  # metadata is free text; only values that read as JSON are settings
        values |= value if key == "config" and isinstance(value, dict) else {key: value}
    return Settings(checkpoint.path, values)


def matrix_shape(checkpoint: Checkpoint, name: str, what: str) -> tuple[int, ...]:
    """Return a matrix's shape. Raises CheckpointError that `what` lacks it, or that it is no matrix."""
    shape = checkpoint.shape(name) if name in checkpoint.tensors else ()
    if len(shape) != 2:
        require_tensors(checkpoint, {name: (0, 0)}, what)
    return shape


class Settings:
    """Values of a configuration, checked as they are asked for."""

    def __init__(self, path: Path, values: Mapping[str, object]) -> None:
        """`path`: the weights, for messages."""
        self._path = path
        self._values = values

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise the CheckpointError for a value that will not do."""
        raise CheckpointError(f"{self._path}: setting {key} is {self._values[key]!r}; {why}.")

    def require(self, fixed: Mapping[str, object]) -> None:
        """Refuse values other than those that the network is built for."""
        for key, usual in fixed.items():
            if self._values.get(key, usual) != usual:
                self.refuse(key, f"only {usual!r} is supported")

    def number(self, key: str, default: float) -> float:
        """Return a positive number, or the default."""
        if key not in self._values:
            return default
        value = self._values[key]
        if not _is_number(value) or not value > 0:
            self._must_be(key, "a positive number")
        return value

    def number_or_none(self, key: str, default: float) -> float | None:
        """Return a positive number, or None where the configuration says null."""
        return self.number(key, default) if self._values.get(key, default) is not None else None

    def integer(self, key: str, default: int) -> int:
        """Return a positive whole number."""
        value = self.number(key, default)
        if value != int(value):
            self._must_be(key, "a whole number")
        return int(value)

    def integers(
        self, keys: tuple[str, ...], default: tuple[int, ...], *, count: int | None = None
    ) -> tuple[int, ...]:
        """Return a list of whole numbers, `count` if given, under the first of `keys` that is there."""
        key = next((key for key in keys if key in self._values), None)
        if key is None:
            return default
        value = self._values[key]
        whole = isinstance(value, list | tuple) and all(type(number) is int for number in value)
        if not whole or count not in (None, len(value)):
            self._must_be(key, f"{'a list of' if count is None else count} whole numbers")
        return tuple(value)

    def listed(self, key: str) -> list[object]:
        """Return a list, empty where the configuration has none."""
        value = self._values.get(key)
        return value if isinstance(value, list) else []

    def _must_be(self, key: str, what: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: setting {key} is {self._values[key]!r}, but must be {what}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _json_object(text: str) -> dict[str, object]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
