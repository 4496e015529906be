"""Several models and one device: each is loaded when it is first used, and lies on the device while it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

import torch

from library.core.device import empty_cache


class Movable(Protocol):
    """A module, or several that go together."""

    def to(self, device: torch.device, /) -> object:
        """Move to a device."""


Model = TypeVar("Model", bound=Movable)


class Shelf(Generic[Model]):
    """Models by name. With `offload` only the one in use is on the device; the others wait in main memory."""

    def __init__(
        self, loaders: Mapping[str, Callable[[], Model]], device: torch.device, *, offload: bool
    ) -> None:
        """`loaders` load straight to the device, so that a model never takes main memory it does not need."""
        self._loaders = loaders
        self._device = device
        self._offload = offload
        self._loaded: dict[str, Model] = {}
        self._in_use: str | None = None

    def use(self, name: str) -> Model:
        """Return a model, on the device. With `offload` the one that was in use before leaves it first."""
        if self._offload and name != self._in_use:
            if self._in_use is not None:
                self._loaded[self._in_use].to(torch.device("cpu"))
                empty_cache(self._device)
            if name in self._loaded:
                self._loaded[name].to(self._device)
        if name not in self._loaded:
            self._loaded[name] = self._loaders[name]()
        self._in_use = name
        return self._loaded[name]
