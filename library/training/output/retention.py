"""Which of the periodic files are kept. Only files that this run wrote are ever removed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.core.files import explain, remove_directory
from library.core.log import logger
from library.options.saving import SavingOptions

_log = logger("saving")

Identity = tuple[int, int]  # size and time of change


@dataclass(frozen=True)
class Saved:
    """What one periodic save wrote, with each file's identity at that moment. `step`: when it was."""

    by_epoch: bool
    step: int
    files: dict[Path, Identity]


class Retention:
    """Keeps the last files, as --save_last_n_epochs, --save_last_n_steps and --save_last_n_files say.

    A file is removed only if this run wrote it and nobody has changed it since.
    """

    def __init__(self, options: SavingOptions) -> None:
        self._options = options
        self._saved: list[Saved] = []

    def add(self, files: Sequence[Path], *, by_epoch: bool, step: int) -> None:
        """Take note of the files of one save, which belong together, and remove those that are old now.

        A save under the name of an earlier one takes its place.
        """
        for old in self._saved:
            for file in files:
                old.files.pop(file, None)
        there = {file: identity for file in files if (identity := _identity(file)) is not None}
        self._saved.append(Saved(by_epoch, step, there))
        for old in self._outdated(step):
            for file in [file for file, identity in old.files.items() if _remove(file, identity)]:
                del old.files[file]
        self._saved = [saved for saved in self._saved if saved.files]

    def export_state(self) -> dict[str, object]:
        """Return the saves that are still there, for JSON. Files are named without their folder."""
        return {
            "saved": [
                {
                    "by_epoch": saved.by_epoch,
                    "step": saved.step,
                    "files": {file.name: list(identity) for file, identity in saved.files.items()},
                }
                for saved in self._saved
            ]
        }

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Take over the saves of the run that is gone on with; their files are in --output_dir still."""
        folder = self._options.output_dir
        self._saved = [
            Saved(
                by_epoch=saved["by_epoch"],
                step=saved["step"],
                files={
                    folder / Path(name).name: (size, changed)
                    for name, (size, changed) in saved["files"].items()
                },
            )
            for saved in state["saved"]
        ]

    def _outdated(self, step: int) -> list[Saved]:
        options = self._options
        by_epoch = [saved for saved in self._saved if saved.by_epoch]
        outdated: list[Saved] = []
        if options.save_last_n_epochs is not None:
            outdated += by_epoch[: -options.save_last_n_epochs]
        if options.save_last_n_steps is not None:
            limit = step - options.save_last_n_steps
            outdated += [saved for saved in self._saved if not saved.by_epoch and saved.step < limit]
        if options.save_last_n_files is not None:
            outdated += self._saved[: -options.save_last_n_files]
        return outdated


def _remove(file: Path, identity: Identity) -> bool:
    """Remove a file if it is the one that was written; return False where it has to be tried again."""
    if _identity(file) != identity:
        return True
    try:
        if file.is_dir():
            remove_directory(file)
        else:
            file.unlink(missing_ok=True)
        _log.info("removed %s, an older save", file)
    except OSError as error:
        _log.warning("%s could not be removed: %s", file, explain(error))
        return False
    return True


def _identity(file: Path) -> Identity | None:
    """Return what tells whether it is still the same file; None if it cannot be asked."""
    try:
        stat = os.stat(file)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
