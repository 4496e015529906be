"""A process that dies at a chosen call into the operating system, and the work it is killed in."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

from library.core import files
from library.options.saving import SavingOptions
from library.training.state.checkpoint import (
    Keep,
    StateRecord,
    final_state_path,
    prune_states,
    saved_states,
    step_state_path,
    write_state,
)

# What Python's audit hooks tell of files and folders; `os.fsync` they leave out, so that is wrapped.
_EVENTS = {
    *("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.listdir", "os.scandir"),
    *("shutil.rmtree",),
}
SAVING = "kiwi"


def saving(folder: Path) -> SavingOptions:
    return SavingOptions(output_dir=folder, output_name=SAVING)


def write(folder: Path, step: int, path: Path | None = None) -> None:
    """Commit a small state and prune, two kept."""
    record = StateRecord(
        name=SAVING,
        run="r",
        serial=max((state.record.serial for state in saved_states(saving(folder))), default=0) + 1,
        interim=True,
        step=step,
        events_done=True,
        seed=7,
        world=1,
        steps_per_epoch=10,
        dataset="d",
    )
    options = saving(folder)
    state = write_state(path or step_state_path(options, step), record, _write_files)
    prune_states(options, Keep(steps=1), state)


def save_a_new_state(folder: Path) -> None:
    """The fourth state: the second is pruned."""
    write(folder, 4)


def save_over_the_only_state(folder: Path) -> None:
    """As at the end of a run that was made longer."""
    write(folder, 5, final_state_path(saving(folder)))


def killed_at(call: int, work: Callable[[Path], None], folder: Path) -> bool:
    """Do `work` in another process, and kill it just before its call number `call`; False: it had fewer."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_work_and_die, args=(call, work, folder))
    process.start()
    process.join()
    assert process.exitcode in (0, 9)
    return process.exitcode == 9


def killed_after(seconds: float, folder: Path, first_step: int) -> None:
    """Save one state after another in another process, and kill it `seconds` after the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ready = context.Event()
    process = context.Process(target=_save_forever, args=(folder, first_step, ready))
    process.start()
    ready.wait(60)
    time.sleep(seconds)
    process.kill()
    process.join()


def _save_forever(folder: Path, first_step: int, ready: Event) -> None:
    files.sweep_leftovers(folder)
    ready.set()
    for step in range(first_step, 10**8):
        write(folder, step)


def _work_and_die(call: int, work: Callable[[Path], None], folder: Path) -> None:
    calls = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal calls
        calls += event in _EVENTS
        if calls > call:
            os._exit(9)

    def fsync(descriptor: int) -> None:
        count("open", ())
        real(descriptor)

    real, files.os.fsync = os.fsync, fsync
    sys.addaudithook(count)
    work(folder)
    os._exit(0)


def _write_files(folder: Path) -> None:
    for part in ("network", "optimizer"):
        (folder / f"{part}.safetensors").write_bytes(os.urandom(300))
