"""Devices by name, and their peaks of memory."""

from __future__ import annotations

import pytest
import torch

from library.core.device import device_named, forget_peak_memory
from library.core.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "current"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", []), ("meta", [])]
)
def test_a_gpu_that_is_named_by_its_number_becomes_the_current_one(
    monkeypatch: pytest.MonkeyPatch, name: str, current: list[str]
) -> None:
    made: list[str] = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(str(device)))
    assert device_named(name) == torch.device(name)
    assert made == current


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, device: torch.device) -> None:
        raise RuntimeError("CUDA error: invalid device ordinal\nmore of it")

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("it is not there"))
    with pytest.raises(
        ConfigError, match="--device cuda:9 cannot be used: CUDA error: invalid device ordinal.$"
    ):
        device_named("cuda:9")


def test_only_a_gpu_forgets_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(str(device)))
    for name in ("cpu", "cuda:1", "meta"):
        forget_peak_memory(torch.device(name))
    assert asked == ["cuda:1"]
