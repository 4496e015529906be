"""Models that share a device."""

from __future__ import annotations

import torch
from torch import nn

from library.nn.weights.shelf import Shelf


class Tracked(nn.Linear):
    """Remembers where it was sent."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.sent: list[str] = []

    def to(self, device: object) -> Tracked:  # type: ignore[override]
        self.sent.append(str(device))
        return self


def shelf(*, offload: bool) -> tuple[Shelf, dict[str, Tracked], list[str]]:
    models = {"a": Tracked(), "b": Tracked()}
    loads: list[str] = []

    def loader(name: str) -> Tracked:
        loads.append(name)
        return models[name]

    loaders = {name: lambda name=name: loader(name) for name in models}
    return Shelf(loaders, torch.device("meta"), offload=offload), models, loads


def test_a_model_is_loaded_once_and_only_when_used() -> None:
    subject, models, loads = shelf(offload=False)
    assert subject.use("b") is models["b"] and subject.use("b") is models["b"]
    assert loads == ["b"]


def test_without_offload_every_model_stays_where_it_was_loaded() -> None:
    subject, models, _ = shelf(offload=False)
    for name in "abab":
        subject.use(name)
    assert models["a"].sent == models["b"].sent == []


def test_with_offload_only_the_one_in_use_is_on_the_device() -> None:
    subject, models, _ = shelf(offload=True)
    subject.use("a")
    subject.use("a")
    assert models["a"].sent == []
    subject.use("b")
    assert models["a"].sent == ["cpu"] and models["b"].sent == []
    subject.use("a")
    assert models["a"].sent == ["cpu", "meta"] and models["b"].sent == ["cpu"]
