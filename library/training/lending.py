"""Models that are in memory only while someone needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from library.core.device import empty_cache

Model = TypeVar("Model")


class Lending(Generic[Model]):
    """A model that is loaded at its first use, and can be let go and loaded again."""

    def __init__(self, load: Callable[[], Model], device: torch.device) -> None:
        self._load = load
        self._device = device
        self._model: Model | None = None

    def get(self) -> Model:
        """Return the model, loading it if it is not there."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def release(self) -> None:
        """Let the model go and give its memory back."""
        if self._model is not None:
            self._model = None
            empty_cache(self._device)
