"""The threads that ask for copies; the copies themselves need a GPU, see test_block_swap.py."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from library.nn.swap.copy_streams import CudaCopier

SECOND = torch.device("cuda", 1)


class Stream:
    """Notes which thread it is told by."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.told_by: list[str] = []

    def wait_event(self, event: object) -> None:
        self.told_by.append(threading.current_thread().name)

    def record_event(self) -> str:
        return "done"


@pytest.mark.parametrize("page_locked", [False, True])
def test_a_thread_that_copies_is_the_device_s_before_anything_else(
    monkeypatch: pytest.MonkeyPatch, page_locked: bool
) -> None:
    """Each thread begins on the first GPU, and would take memory there for the sake of another one."""
    happened: list[tuple[str, object]] = []

    def note_device(device: torch.device) -> None:
        happened.append((threading.current_thread().name, device))

    def use(stream: Stream) -> AbstractContextManager[None]:
        happened.append((threading.current_thread().name, "copies"))
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "set_device", note_device)
    copier = CudaCopier(SECOND, page_locked=page_locked)
    target, source = torch.zeros(3), torch.ones(3)
    assert copier.copy([(target, source)], "mark").result() == "done"
    assert copier.copy_back([(source, target * 2)], "mark").result() == "done"
    assert target.tolist() == [1, 1, 1] and source.tolist() == [2, 2, 2]
    here = threading.current_thread().name
    threads = [name for name, what in happened if what == "copies"]
    if page_locked:
        assert happened == [(here, "copies")] * 2
    else:
        assert here not in threads and len(set(threads)) == 2
        assert happened == [step for name in threads for step in ((name, SECOND), (name, "copies"))]
