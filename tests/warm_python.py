"""Two ways to start a script in a process of its own: a Python of its own, or a fork of one that is warm.

Importing torch and the library takes four seconds of a run that else would take one; see warm_server.py.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
_NUMBER = struct.Struct("i")


class Script:
    """A script in a process of its own. `wait` waits for so many seconds, or until it has ended."""

    def __init__(self, pid: int, wait: Callable[[float | None], int | None]) -> None:
        self.pid, self._wait = pid, wait
        self.exitcode: int | None = None  # once it has ended; negative for a signal

    def join(self, seconds: float | None = None) -> None:
        """Wait until it has ended, but not longer than this."""
        if self.exitcode is None:
            self.exitcode = self._wait(seconds)

    def is_alive(self) -> bool:
        """Whether it has not ended yet."""
        self.join(0)
        return self.exitcode is None

    def kill(self) -> None:
        """End it without a word."""
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)


class ColdPython:
    """Starts every script with a Python of its own."""

    def start(
        self, words: Sequence[str], environment: Mapping[str, str], out: int = 1, err: int = 2, read: int = -1
    ) -> Script:
        """Start Python in the repository with these words.

        It writes to the descriptors `out` and `err`, and reads from `read`, or nothing.
        """
        process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL if read < 0 else read,
            stdout=out,
            stderr=err,
            cwd=ROOT,
            env=environment,
        )

        def wait(seconds: float | None) -> int | None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            return process.returncode

        return Script(process.pid, wait)

    def close(self) -> None:
        """Nothing is kept."""


class WarmPython:
    """Has the server start scripts, and launchers: words that begin with `-m`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, str(ROOT / "tests/warm_server.py"), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=environment,
                pass_fds=[theirs.fileno()],
            )

    def start(
        self, words: Sequence[str], environment: Mapping[str, str], out: int = 1, err: int = 2, read: int = -1
    ) -> Script:
        """Start Python in the repository with these words.

        It writes to the descriptors `out` and `err`, and reads from `read`, or nothing.
        """
        with open(os.devnull) as nothing:
            return _ask(self.line, words, environment, nothing.fileno() if read < 0 else read, out, err)

    def close(self) -> None:
        """End the server; what it has started goes on."""
        self.line.close()
        self._server.wait()


def _ask(line: socket.socket, words: Sequence[str], environment: Mapping[str, str], *streams: int) -> Script:
    """Ask the server for a script."""
    channel, theirs = socket.socketpair()
    with theirs:
        request = json.dumps({"words": list(words), "environment": dict(environment)})
        socket.send_fds(line, [request.encode()], [theirs.fileno(), *streams])

    def wait(seconds: float | None) -> int | None:
        ended = select.select([channel], [], [], seconds)[0]
        return _NUMBER.unpack(channel.recv(_NUMBER.size, socket.MSG_WAITALL))[0] if ended else None

    return Script(wait(None), wait)  # its number comes first, then its exit code


def rank_of(process: psutil.Process) -> int | None:
    """Return which of the processes of a run this is; None: it is something else."""
    name = process.name()
    if name.startswith("rank "):
        return int(name.removeprefix("rank "))
    rank = process.environ().get("RANK")
    return None if rank is None else int(rank)


def main() -> None:
    """Take Python's place in a shell script: `python warm_python.py LINE SCRIPT ...`."""
    with socket.socket(fileno=int(sys.argv[1])) as line:
        script = _ask(line, sys.argv[2:], os.environ, 0, 1, 2)
    script.join()
    sys.exit(script.exitcode)


if __name__ == "__main__":
    main()
