"""A kill at any moment while states are saved and pruned loses no state."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from library.core.files import sweep_leftovers
from library.options.state import StateOptions
from library.training.state.checkpoint import (
    SavedState,
    final_state_path,
    find_resumed,
    saved_states,
    step_state_path,
    verify_state,
)
from tests.reliability import dying
from tests.reliability.dying import (
    killed_after,
    killed_at,
    save_a_new_state,
    save_over_the_only_state,
    saving,
)

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows cannot fork")


def newest(folder: Path) -> SavedState:
    """What the next run goes on from; verified."""
    found = find_resumed(StateOptions(resume="latest"), saving(folder))
    assert found is not None
    return found


def test_saving_and_pruning(tmp_path: Path) -> None:
    before = tmp_path / "before"
    for step in (2, 3):
        dying.write(before, step)
    foreign = final_state_path(saving(before))  # somebody else's folder with a name for a state
    foreign.mkdir()
    (foreign / "photo.jpg").write_bytes(b"1")
    reached = []
    for call in range(1000):
        folder = tmp_path / str(call)
        shutil.copytree(before, folder)
        if not killed_at(call, save_a_new_state, folder):
            break
        states = saved_states(saving(folder))
        for state in states:  # no half-deleted one has the name of a state
            verify_state(state)
        assert len(states) >= 2
        reached.append(newest(folder).record.step)
        assert (foreign / "photo.jpg").exists()
        sweep_leftovers(folder)
        assert not list(folder.glob(".*"))
    assert len(reached) > 25
    assert reached == sorted(reached)
    assert set(reached) == {3, 4}
    assert not step_state_path(saving(folder), 2).exists()


def test_replacing_the_only_state(tmp_path: Path) -> None:
    before = tmp_path / "before"
    dying.write(before, 1, final_state_path(saving(before)))
    reached, gone = [], 0
    for call in range(1000):
        folder = tmp_path / str(call)
        shutil.copytree(before, folder)
        if not killed_at(call, save_over_the_only_state, folder):
            break
        gone += not saved_states(saving(folder))
        reached.append(newest(folder).record.step)
        sweep_leftovers(folder)
        assert [path.name for path in folder.iterdir()] == ["kiwi-state"]
    assert reached == sorted(reached)
    assert set(reached) == {1, 5}
    assert gone == 1  # for an instant there is none under its name: it is put back


def test_sixty_random_kills(tmp_path: Path) -> None:
    draw, reached = random.Random(), 0
    for _ in range(60):
        killed_after(0.1 * draw.random(), tmp_path, reached + 1)
        states = saved_states(saving(tmp_path))
        for state in states:
            verify_state(state)
        step = states[-1].record.step if states else 0
        assert step >= reached
        assert len(states) >= min(2, step)
        reached = step
    assert reached >= 10
    assert len(list(tmp_path.glob(".*"))) <= 2  # of the last kill
