"""SHA-256 of file content, remembered per file so that an unchanged one is not read again."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from library.core.errors import StorageError
from library.core.files import write_text


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_text(*parts: str) -> str:
    """Return the hex SHA-256 of several texts; their lengths are hashed too, so ("ab", "c") is not ("a",
    "bc")."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


class HashLedger:
    """Digests of files keyed by path and trusted while size, mtime, ctime and inode stay what they were.

    The ledger is a convenience: a missing, damaged or foreign file just means that content is hashed again.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_ledger_path()
        self._known = _read(self.path)
        self._new: dict[str, list[str]] = {}

    def sha256(self, path: Path) -> str:
        """Return the hex SHA-256 of `path`, reading it only if it changed since it was last hashed."""
        key, stamp = os.path.abspath(path), file_stamp(path)
        entry = self._new.get(key) or self._known.get(key)
        if entry is None or entry[0] != stamp:
            entry = [stamp, sha256_file(path)]
            self._new[key] = entry
        return entry[1]

    def save(self) -> None:
        """Write new digests back, on top of what other processes have written meanwhile."""
        if self._new:
            self._known = {**_read(self.path), **self._new}
            self._new = {}
            with suppress(StorageError):  # it only saves time at the next start
                write_text(self.path, json.dumps(self._known))


def default_ledger_path() -> Path:
    """Return the ledger's place: `flow-scripts/hashes.json` in the user's cache folder (XDG_CACHE_HOME,
    LOCALAPPDATA)."""
    root = (
        os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/.cache")
    )
    return Path(root) / "flow-scripts" / "hashes.json"


def file_stamp(path: Path) -> str:
    """Return what changes whenever a file is written: size, times, inode. Raises OSError if there is none."""
    stat = os.stat(path)
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"


def _read(path: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {k: v for k, v in content.items() if isinstance(v, list) and len(v) == 2}
