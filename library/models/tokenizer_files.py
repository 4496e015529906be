"""Where the files of a tokenizer lie: named, beside the weights, or in the hub's cache. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tokenizers import Tokenizer

from library.core.errors import CheckpointError, ConfigError
from library.core.files import explain
from library.core.hashing import sha256_text


@dataclass(frozen=True)
class TokenizerFiles:
    """The content of a tokenizer's files by their usual names; `origin` tells where they lie."""

    origin: str
    contents: dict[str, bytes]

    @property
    def digest(self) -> str:
        """SHA-256 of the content."""
        digests = [hashlib.sha256(content).hexdigest() for content in self.contents.values()]
        return digests[0] if len(digests) == 1 else sha256_text(*digests)

    def from_json(self) -> Tokenizer:
        """Build what `tokenizer.json` describes.

        Raises:
            CheckpointError: it describes none.
        """
        try:
            return Tokenizer.from_buffer(self.contents["tokenizer.json"])
        except Exception as error:  # the package raises bare Exception
            raise CheckpointError(f"{self.origin} is not a readable tokenizer.json: {error}.") from error

    def byte_pairs(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """Return what `vocab.json` and `merges.txt` hold: ids by token, and pairs, the first to merge first.

        Raises:
            CheckpointError: damaged, or not of one tokenizer.
        """
        vocab = self.read_json("vocab.json")
        if not vocab or not all(type(number) is int for number in vocab.values()):
            raise CheckpointError(f"vocab.json of {self.origin} is not a vocabulary: tokens with their ids.")
        lines = self.contents["merges.txt"].decode("utf-8", errors="replace").split("\n")
        pairs = [line.rstrip("\r").split(" ") for line in lines if line.strip() and not _is_version(line)]
        for pair in pairs:
            if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
                raise CheckpointError(
                    f"merges.txt of {self.origin} merges {' '.join(pair)!r}, which does not go with its "
                    f"vocab.json; both must be of one tokenizer."
                )
        return vocab, [(left, right) for left, right in pairs]

    def read_json(self, name: str) -> dict[str, Any]:
        """Return what a JSON file of the tokenizer holds; nothing if it is not there.

        Raises:
            CheckpointError: damaged.
        """
        try:
            content = json.loads(self.contents.get(name, b"{}"))
        except ValueError as error:
            raise CheckpointError(f"{name} of {self.origin} is not readable JSON: {error}.") from error
        return content if isinstance(content, dict) else {}


def _is_version(line: str) -> bool:
    return line.startswith("#version")


Found = TypeVar("Found", bound=TokenizerFiles)


@dataclass(frozen=True)
class TokenizerPlaces(Generic[Found]):
    """Where one model's tokenizer is looked for.

    kind: what is made of the files. model, flag, hint: for messages. file_sets: files that make a tokenizer
    together, best first. inside, beside: folders in the folder of the weights ("." is itself), and in the
    folder around that. companion: a file that belongs to a set of several, where there is one.
    """

    kind: type[Found]
    model: str
    flag: str
    repository: str
    file_sets: tuple[tuple[str, ...], ...]
    inside: tuple[str, ...]
    beside: tuple[str, ...]
    companion: str | None = None
    hint: str = ""

    def find(self, weights: Path, named: Path | None, cache_dir: Path | None) -> Found:
        """Return the tokenizer: the named one, else the one near the weights, else the hub's.

        Raises:
            ConfigError: the named one is none, or there is none anywhere.
        """
        if named is not None:
            return self.named(Path(named))
        return self.near(Path(weights)) or self.from_hub(Path(weights), cache_dir)

    def named(self, path: Path) -> Found:
        """Return the tokenizer that the user has named: one of its files, or a folder.

        Raises:
            ConfigError: it is none, or cannot be read.
        """
        if not path.is_dir():
            return self._named_file(path)
        folders = [path / name for name in (".", *self.inside)]
        if found := self._in_folders(folders):
            return found
        raise ConfigError(f"{self.flag} {path} holds {self._wanted('neither', 'nor')}.")

    def near(self, weights: Path) -> Found | None:
        """Return the tokenizer that lies beside the weights (a file or a folder), if one does."""
        return self._in_folders(list(self._folders(weights)))

    def from_hub(self, weights: Path, cache_dir: Path | None) -> Found:
        """Return the tokenizer of the hub's repository: from the hub's cache, or downloaded.

        Raises:
            ConfigError: neither can be had; the message tells all the places that were tried.
        """
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        for names in self.file_sets:
            cached = [try_to_load_from_cache(self.repository, name, cache_dir=cache_dir) for name in names]
            if all(isinstance(file, str) for file in cached):
                return self._read(Path(cached[0]).parent, names)
        try:
            file = Path(hf_hub_download(self.repository, self.file_sets[0][0], cache_dir=cache_dir))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            folders = ", ".join(map(str, dict.fromkeys(self._folders(weights))))
            raise ConfigError(
                f"No tokenizer of {self.model} was found for {weights}: there is {self._wanted('no', 'or')} "
                f"in {folders}, and the hub's {self.repository} could not be had ({type(error).__name__}). "
                f"Name such a file or its folder with {self.flag}{self.hint}."
            ) from error
        return self._read(file.parent, (file.name,))

    def _folders(self, weights: Path) -> Iterator[Path]:
        folder = weights if weights.is_dir() else weights.parent
        yield from (folder / name for name in self.inside)
        yield from (folder.parent / name for name in self.beside)

    def _in_folders(self, folders: list[Path]) -> Found | None:
        for folder in folders:
            for names in self.file_sets:
                if all((folder / name).is_file() for name in names):
                    return self._read(folder, names)
        return None

    def _named_file(self, path: Path) -> Found:
        """A file of a set of several stands for the set; any other is what its suffix says."""
        for names in self.file_sets:
            if len(names) > 1 and path.name in names:
                return self._read(path.parent, names, f"{self.flag} ")
        singles = {Path(names[0]).suffix: names[0] for names in self.file_sets if len(names) == 1}
        usual = singles.get(path.suffix.lower(), list(singles.values())[-1])
        return self.kind(str(path), {usual: _content(path, f"{self.flag} ")})

    def _read(self, folder: Path, names: tuple[str, ...], flag: str = "") -> Found:
        contents = {name: _content(folder / name, flag) for name in names}
        if len(names) > 1 and self.companion and (folder / self.companion).is_file():
            contents[self.companion] = _content(folder / self.companion, flag)
        return self.kind(str(folder / " + ".join(names)), contents)

    def _wanted(self, before: str, between: str) -> str:
        """Say which files are looked for: "neither tokenizer.json nor tokenizer.model"."""
        return f"{before} " + f" {between} ".join(" with ".join(names) for names in self.file_sets)


def _content(file: Path, flag: str = "") -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag}{file} cannot be read: {explain(error)}.") from error
