"""Files that are either complete or not there."""

from __future__ import annotations

import errno
import functools
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=path.suffix[-16:])
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
        raise StorageError(f"Could not write {path}: {explain(error)}.") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


@contextmanager
def staged_directory(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path`; when the block ends, flush all its files and rename it to `path`.

    Whoever looks at `path` sees the whole new folder, the whole old one, or (for an instant, when an old one
    is replaced) none. On any failure what was at `path` stays and the hidden folder is removed.

    Raises:
        StorageError: the operating system refused a write (disk full, no permission).
    """
    path = Path(path)
    staging = path.parent / _owned_name("tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        for file in sorted(staging.iterdir()):
            _sync_file(file)
        _sync_directory(staging)
        if path.exists():
            remove_directory(path)
        os.rename(staging, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise StorageError(f"Could not write {path}: {explain(error)}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Delete a folder; it is renamed first, so that nobody takes a half-deleted one for whole.

    Raises:
        OSError: it cannot be renamed. What cannot be deleted then is left to `sweep_leftovers`.
    """
    trash = path.parent / _owned_name("trash")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def sweep_leftovers(folder: Path) -> None:
    """Delete hidden folders in `folder` that dead processes left in the middle of the functions above.

    Those of living processes and of other computers that share the disk are left alone.
    """
    import psutil  # comes with accelerate; signal 0, the POSIX way to ask, kills the process on Windows

    for leftover in Path(folder).glob(".folder-*"):
        owner, _, number = leftover.name.removeprefix(".folder-").rpartition("-")
        own = owner in (_owner("tmp"), _owner("trash")) and number.isdigit()
        if own and (int(number) == os.getpid() or not psutil.pid_exists(int(number))):
            shutil.rmtree(leftover, ignore_errors=True)


def _owned_name(purpose: str) -> str:
    return f".folder-{_owner(purpose)}-{os.getpid()}"


def _owner(purpose: str) -> str:
    return f"{purpose}-{platform.node()[:32]}"


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


def explain(error: OSError) -> str:
    """Return the reason of an OSError as a few plain words."""
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    return (error.strerror or str(error)).lower()


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


def _sync_directory(path: Path) -> None:
    """Flush the rename itself. Windows cannot open a folder and needs no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
