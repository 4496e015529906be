"""A store of cache entries: small safetensors files known by a key, verified to the last byte when read.

A parsed safetensors header says nothing about the bytes behind it, so each file carries the SHA-256 of itself
(with that field zeroed) in its metadata. Files appear by rename, under a name that is the hash of all that
decides their content, so two processes that write the same entry do no harm to each other.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from library.core.errors import DataError, StorageError
from library.core.files import explain, write_bytes, write_text
from library.core.hashing import file_stamp

_ZEROS = b"0" * 64
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')  # inside a JSON string the quotes would be escaped
_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header, in so many bytes
_LEDGER = "verified.json"
_ABANDONED_SECONDS = 3600


class CacheStore:
    """Entries in the sub-folders of one folder: `directory/ab/abcdef....safetensors`.

    Reading every byte of every entry at each start would take longer than the start itself, so the store
    remembers the stamp (size, times, inode) of each file that it has written or verified, and takes an
    unchanged one for good at the check. `read` verifies all bytes every time.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._verified = _read_ledger(self.directory / _LEDGER)
        self._new: dict[str, str] = {}

    def path(self, key: str) -> Path:
        """Return where an entry is, or would be."""
        return self.directory / key[:2] / f"{key}.safetensors"

    def check(self, key: str) -> bool:
        """Say whether an entry is there and undamaged; one that has not changed is not read again."""
        path = self.path(key)
        try:
            stamp = file_stamp(path)
        except OSError:
            return False
        if stamp in (self._new.get(key), self._verified.get(key)):
            return True
        if not _is_intact(_read_file(path)):
            return False
        self._new[key] = stamp
        return True

    def find(self, key: str) -> dict[str, Tensor] | None:
        """Return an entry's tensors, or None if it is not there or damaged."""
        content = _read_file(self.path(key))
        return load(content) if _is_intact(content) else None

    def read(self, key: str) -> dict[str, Tensor]:
        """Return an entry's tensors. They own their memory.

        Raises:
            DataError: the entry has gone or was damaged since the check. A damaged one is removed, so that
                the next start makes it anew.
        """
        tensors = self.find(key)
        if tensors is None:
            path = self.path(key)
            what = "was damaged after it was written" if path.exists() else "has gone since the start"
            path.unlink(missing_ok=True)
            raise DataError(f"The cache entry {path} {what}; start again to have it made anew.")
        return tensors

    def write(self, key: str, tensors: Mapping[str, Tensor], about: str) -> None:
        """Write an entry; `about` (a picture's name, a text) is kept in it for people who look inside.

        Raises:
            StorageError: the disk is full or the folder cannot be written to.
        """
        path = self.path(key)
        write_bytes(path, _serialise(tensors, about), durable=False)
        self._new[key] = file_stamp(path)

    def remember(self) -> None:
        """Write down which files are verified, and remove what killed processes left half-written.

        The list only saves time at the next start, so a folder that cannot be written to is no error here.
        """
        if not self._new:
            return
        self._verified = {**_read_ledger(self.directory / _LEDGER), **self._new}
        self._new = {}
        try:
            write_text(self.directory / _LEDGER, json.dumps(self._verified))
        except StorageError:
            return
        _sweep(self.directory)


def _serialise(tensors: Mapping[str, Tensor], about: str) -> bytes:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    readable = about.encode("utf-8", "replace").decode("utf-8")  # file names need not be valid text
    content = save(contiguous, {"about": readable, "sha256": _ZEROS.decode()})
    start = content.index(b'"sha256":"' + _ZEROS) + len(b'"sha256":"')
    digest = hashlib.sha256(content).hexdigest().encode()
    return b"".join((content[:start], digest, content[start + len(_ZEROS) :]))


def _is_intact(content: bytes) -> bool:
    """Say whether a file's own digest fits. Every byte counts, so a change of any one shows."""
    header_end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    match = _DIGEST.search(content, _LENGTH_BYTES, min(header_end, len(content)))
    if match is None:
        return False
    view = memoryview(content)
    digest = hashlib.sha256(view[: match.start(1)])
    digest.update(_ZEROS)
    digest.update(view[match.end(1) :])
    return digest.hexdigest().encode() == match.group(1)


def _read_file(path: Path) -> bytes:
    """Return a file's bytes, or none at all if it is not there. Raises DataError if the disk refuses."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise DataError(f"The cache entry {path} cannot be read: {explain(error)}.") from error


def _read_ledger(path: Path) -> dict[str, str]:
    """Return the remembered stamps; a list that is missing, damaged or foreign just means verifying again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _sweep(directory: Path) -> None:
    """Remove temporary files so old that whoever wrote them must be dead: an entry takes milliseconds to
    write.
    """
    too_old = time.time() - _ABANDONED_SECONDS
    for path in directory.glob("*/.tmp-*"):
        try:
            if path.stat().st_mtime < too_old:
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            continue  # another process swept it
