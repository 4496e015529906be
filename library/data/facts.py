"""What is known of pictures, remembered by their content, so that each is decoded only once."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from library.core.errors import StorageError
from library.core.files import write_text
from library.data.images import PictureFacts, read_facts

_VERSION = 1  # raise when read_facts begins to answer differently


class FactLedger:
    """Facts of pictures that decoded, by the SHA-256 of their bytes.

    Like the hash ledger it is a convenience: when the file is missing or damaged, pictures are decoded again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = _read(path)
        self._new: dict[str, list[int]] = {}

    def facts(self, path: Path, digest: str) -> PictureFacts:
        """Return a picture's facts; it is decoded if its content is new. Raises DataError as `read_facts`."""
        entry = self._known.get(digest) or self._new.get(digest)
        if entry is None:
            facts = read_facts(path)
            self._new[digest] = [*facts.size, int(facts.has_alpha)]
            return facts
        return PictureFacts((entry[0], entry[1]), bool(entry[2]))

    def save(self) -> None:
        """Write new facts back, on top of what other processes have written meanwhile."""
        if self._new:
            self._known = {**_read(self.path), **self._new}
            self._new = {}
            with suppress(StorageError):  # it only saves time at the next start
                write_text(self.path, json.dumps({"version": _VERSION, "pictures": self._known}))


def _read(path: Path) -> dict[str, list[int]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        return {}
    pictures = content.get("pictures")
    if not isinstance(pictures, dict):
        return {}
    return {k: v for k, v in pictures.items() if isinstance(v, list) and [type(n) for n in v] == [int] * 3}
