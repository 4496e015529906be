"""Files that are either complete or not there.

What is unfinished has a hidden name with the computer and the process that works on it, so that what a killed
process leaves can be told from what a living one is about to finish:

    .tmp-<computer>-<process>-<random>        a file that is being written
    .folder-tmp-<computer>-<process>          a folder that is being written
    .folder-aside-<computer>-<process>/NAME   a folder that is being replaced, until the new one is in place
    .folder-trash-<computer>-<process>        a folder that is being deleted
    .folder-held-<computer>-<process>-<random>/NAME   a further name of what is still being read
"""

from __future__ import annotations

import errno
import functools
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from library.core.errors import ConfigError, StorageError


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; on success flush it to disk and rename it over `path`.

    On any failure the old file is untouched and the temporary one is removed. The result has the modes that
    the umask gives a new file (a bare `NamedTemporaryFile` would leave 0600).

    Raises:
        StorageError: the operating system refused a write (disk full, no permission).
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".tmp-{_owner()}-", suffix=path.suffix[-16:]
        )
        with os.fdopen(descriptor, "wb") as handle:
            yield handle
            handle.flush()
            if durable:
                os.fsync(handle.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        if durable:
            _sync_directory(path.parent)
    except OSError as error:
        raise StorageError(f"Could not write {path}: {_why(error, path)}.") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


@contextmanager
def staged_directory(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path`; when the block ends, flush all its files and rename it to `path`.

    Whoever looks at `path` sees the whole new folder, the whole old one, or (for an instant, when an old one
    is replaced) none; `put_back` undoes a replacement that a kill interrupts in that instant. On any failure
    what was at `path` is there afterwards, and the hidden folder is not. The files get the modes that the
    umask gives, whoever wrote them.

    Raises:
        StorageError: the operating system refused a write (disk full, no permission).
    """
    path = Path(path)
    staging = path.parent / _hidden_folder("tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        _sync_tree(staging)
        _put_in_place(staging, path)
    except OSError as error:
        raise StorageError(f"Could not write {path}: {_why(error, path)}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _put_in_place(staging: Path, path: Path) -> None:
    """Rename a folder to `path`; what was there before is deleted once the new one is on the disk."""
    aside = path.parent / _hidden_folder("aside") / path.name
    try:
        if path.exists():
            aside.parent.mkdir(exist_ok=True)
            os.rename(path, aside)
        os.rename(staging, path)
    except BaseException:
        put_back(path.parent)
        with suppress(OSError):
            aside.parent.rmdir()
        raise
    _sync_directory(path.parent)
    shutil.rmtree(aside.parent, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Rename folders in `folder` that were set aside and have no successor back to their names."""
    for aside in sorted(Path(folder).glob(".folder-aside-*/*")):
        target = Path(folder) / aside.name
        if not target.exists():
            with suppress(FileNotFoundError):  # another process has just put it back
                os.rename(aside, target)


def remove_directory(path: Path) -> None:
    """Delete a folder; it is renamed first, so that nobody takes a half-deleted one for whole.

    Raises:
        OSError: it cannot be renamed. What cannot be deleted then is left to `sweep_leftovers`.
    """
    trash = path.parent / _hidden_folder("trash")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def hold(path: Path) -> Path:
    """Give a file, or a folder with all that is in it, a further name, under which it stays as it is now.

    A hard link: it takes no room, and what the functions above put in place of `path`, or remove there, is
    another file. A copy where the file system has none. To be ended by `let_go`.

    Raises:
        OSError: it is not there, or cannot be read, or there is no room for a copy.
    """
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{_hidden_folder('held')}-"))
    try:
        _link(path, folder / path.name)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder / path.name


def let_go(held: Path) -> None:
    """Remove the name that `hold` gave."""
    shutil.rmtree(held.parent, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir()
        for entry in source.iterdir():
            _link(entry, target / entry.name)
        return
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # no hard links here, or not of files of others
        shutil.copyfile(source, target)


def sweep_leftovers(folder: Path) -> None:
    """Undo or delete what dead processes left in `folder` in the middle of the functions above.

    What belongs to living processes, or to other computers that share the disk, is left alone.
    """
    import psutil  # comes with accelerate; signal 0, the POSIX way to ask, kills the process on Windows

    put_back(folder)
    hidden = re.compile(rf"\.(?:tmp|folder-[a-z]+)-{re.escape(_computer())}-(\d+)(?:-.*)?")
    for leftover in Path(folder).glob(".*"):
        match = hidden.fullmatch(leftover.name)
        if match is None or (int(match[1]) != os.getpid() and psutil.pid_exists(int(match[1]))):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with suppress(OSError):
                leftover.unlink()


def _hidden_folder(purpose: str) -> str:
    return f".folder-{purpose}-{_owner()}"


def _owner() -> str:
    return f"{_computer()}-{os.getpid()}"


def _computer() -> str:
    return platform.node()[:32]


def write_bytes(path: Path, content: bytes | memoryview, *, durable: bool = True) -> None:
    """Write `content` to `path` atomically. Raises StorageError as `atomic_write` does."""
    with atomic_write(path, durable=durable) as handle:
        handle.write(content)


def write_text(path: Path, content: str) -> None:
    """Write `content` to `path` atomically as UTF-8. Raises StorageError as `atomic_write` does."""
    write_bytes(path, content.encode("utf-8"))


def read_text(path: Path, what: str) -> str:
    """Read a UTF-8 file (a byte order mark is dropped); `what` says in messages what the file is.

    Raises:
        ConfigError: it is missing, is not readable, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{what} {path} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); "
            f"save it as UTF-8."
        ) from error
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {explain(error)}.") from error


def require_writable_directory(path: Path, flag: str) -> None:
    """Create `path` if need be and prove that a file can be made there; `flag` names the option in the
    message.

    Raises:
        ConfigError: the folder cannot be made or written to.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(
            f"{flag} {path} is not a folder that can be written to: {explain(error)}."
        ) from error


def require_name_fits(folder: Path, longest: str, flag: str) -> None:
    """Prove that a file named `longest` can be made in `folder`; `flag` names the option in the message.

    Raises:
        ConfigError: the file system does not take so long a name.
    """
    probe = Path(folder) / longest
    try:
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have made the same one
    except OSError as error:
        raise ConfigError(
            f"{flag} is too long for {folder}: names of {len(os.fsencode(longest))} bytes are made from "
            f"it, and one cannot be made there ({explain(error)})."
        ) from error


def require_room(path: Path, needed: int, advice: str) -> None:
    """Prove that `needed` bytes can be written to `path`; `advice` ends the message.

    Raises:
        StorageError: the disk has less room, or cannot be asked.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise StorageError(f"Could not write {path}: {explain(error)}.") from error
    if free < needed:
        raise StorageError(
            f"Could not write {path}: it needs {needed / 2**20:,.1f} MiB and the disk has "
            f"{free / 2**20:,.1f} MiB free. {advice}"
        )


def explain(error: OSError) -> str:
    """Return the reason of an OSError as a few plain words."""
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    return (error.strerror or str(error)).lower()


def _why(error: OSError, path: Path) -> str:
    """Return `explain`'s words, and what is free on a disk that is full."""
    if error.errno != errno.ENOSPC:
        return explain(error)
    with suppress(OSError):
        free = shutil.disk_usage(path.parent).free
        return f"{explain(error)} ({free / 2**20:,.1f} MiB are free)"
    return explain(error)


@functools.cache  # read once: setting it back and forth from several threads could leave the wrong one
def _umask() -> int:
    """Read the process's umask. POSIX has no way to read it but to set it and set it back."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync_file(path: Path) -> None:
    """Flush a file's content to the disk. Windows wants the file open for writing."""
    with open(path, "r+b") as handle:
        os.fsync(handle.fileno())


def _sync_tree(folder: Path) -> None:
    """Flush a folder with all that is in it to the disk; the files get the modes that the umask gives."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            _sync_tree(entry)
        else:
            os.chmod(entry, 0o666 & ~_umask())
            _sync_file(entry)
    _sync_directory(folder)


def _sync_directory(path: Path) -> None:
    """Flush the rename itself. Windows cannot open a folder and needs no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
