"""The line that ties the processes of a run together: when one ends too early all end, and one says why.

Collectives do not do that: a process whose partner is gone waits for minutes (NCCL), or dies of a broken pipe
that hides the cause (gloo). So each process keeps a plain connection to process 0. The system closes it in
whatever way a process dies, and also answers for a process that is merely busy, so nobody is taken for dead
who is not. Only a computer that is gone is noticed by silence, after half a minute.

Process 0 speaks for all: others send it their farewell and leave quietly. The exit code of the first to fail
is that of all. Torch-free.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from library.core.entry import describe
from library.core.errors import ConfigError, Stopped, UserError

DIED = 1  # exit code of a run one of whose processes died without a word
JOIN_SECONDS = 120.0  # to find each other
HEARING_SECONDS = 0.5  # what several meet at once is told by process 0, which gets this long to meet it too
GRACE_SECONDS = 5.0  # for the main thread to close its files, before the process is ended from outside
_CAUSE_SECONDS = 3.0
_ANSWER_SECONDS = HEARING_SECONDS + GRACE_SECONDS + 5.0
LINGER_SECONDS = 3.0  # to hear the others' farewell at the end
_POLL_SECONDS = 0.5
# Seconds of silence, seconds between probes, probes: a computer that is gone is noticed after 10 + 4 * 5.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}

_DIED = (
    "error: process {rank} died without a word (it was killed, perhaps for want of memory), so all of them "
    "end. --resume latest goes on from the last state."
)


@dataclass(frozen=True)
class Farewell:
    """How a process ended: its exit code, and what there is to say about it."""

    code: int
    text: str = ""


class Lifeline:
    """One process's end of the line. As a context manager it turns this process's failure into that of all.

    Raises:
        SystemExit: on leaving, where another process failed first, or tells what this one had to tell.
    """

    def __init__(
        self, rank: int, peers: dict[int, socket.socket], leave: Callable[[int], None] = os._exit
    ) -> None:
        """`peers`: for process 0 all others, for others process 0. `leave` ends the process on the spot."""
        self._rank, self._leave = rank, leave
        self._peers = {peer: _Peer(peer, connection) for peer, connection in peers.items()}
        self._lock = threading.Lock()
        self._cause: Farewell | None = None  # why the run ends early; set once, under the lock
        self._heard_of_it = threading.Event()  # the cause is another process's
        self._main_leaves = threading.Event()  # the main thread is on its way out
        self._all_heard = threading.Event()  # every farewell of the others
        self._all_said = threading.Event()  # this process's own, or it has nothing to say
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    @classmethod
    def between(cls, rank: int, world: int, agree: Callable[[object], object]) -> Lifeline:
        """Connect all processes; each calls this. `agree` returns process 0's value on every process.

        Raises:
            ConfigError: a process cannot be reached.
        """
        if rank == 0:
            with _server(world) as server:
                token = secrets.token_hex(16)
                agree([server.getsockname()[1], token])
                return cls(rank, _accept(server, world, token))
        port, token = agree(None)  # type: ignore[misc]
        return cls(rank, {0: _connect(rank, port, token)})

    def __enter__(self) -> Lifeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._main_leaves.set()
        try:
            if error is not None:
                self._fail(error)
            elif self._settle(Farewell(0)).code != 0:
                raise SystemExit(self._cause.code)
            else:
                self._tell_all(Farewell(0))
        finally:
            # A connection closed before the other's farewell is read breaks, and what was said is lost.
            self._all_heard.wait(LINGER_SECONDS)
            self._all_said.set()

    def _settle(self, farewell: Farewell) -> Farewell:
        """Return how the run ends: like that, unless it is settled already."""
        with self._lock:
            if self._cause is None:
                self._cause = farewell
            return self._cause

    def _fail(self, error: BaseException) -> None:
        """Make this process's failure that of all; return if nobody else will tell of it."""
        if not isinstance(error, UserError | Stopped):
            # A collective that broke, perhaps: who broke it is about to be heard of.
            self._heard_of_it.wait(_CAUSE_SECONDS)
        text, code = describe(error)
        own = Farewell(code, text)
        if self._rank > 0:
            if self._cause is None:
                self._peers[0].tell(own)
            self._all_heard.wait(_ANSWER_SECONDS)
            if self._heard_of_it.is_set():
                raise SystemExit(self._cause.code) from None
        elif self._settle(own) is own:
            # Before the others leave: launchers end this process as soon as one of them has.
            if text:
                print(text, file=sys.stderr, flush=True)
            self._tell_all(Farewell(code))
            raise SystemExit(code) from None
        else:
            raise SystemExit(self._cause.code) from None

    def _tell_all(self, farewell: Farewell) -> None:
        for peer in self._peers.values():
            peer.tell(farewell)

    # --- the thread ---

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers.values():
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while not self._all_said.is_set() and selector.get_map():
                for key, _ in selector.select(_POLL_SECONDS):
                    farewell = key.data.hear()
                    if farewell is None:
                        continue
                    selector.unregister(key.fileobj)
                    if farewell.code != 0:
                        self._end(farewell)
        self._all_heard.set()
        self._all_said.wait()  # closed before that, the others would take this process for dead
        for peer in self._peers.values():
            peer.connection.close()

    def _end(self, farewell: Farewell) -> None:
        """End this process, because another one ended like that."""
        if self._rank == 0 and self._cause is None:
            time.sleep(HEARING_SECONDS)
        if self._settle(farewell) is not farewell:
            return
        self._tell_all(Farewell(farewell.code))
        if farewell.text and self._speaks():
            print(f"\n{farewell.text}", file=sys.stderr, flush=True)  # below a progress bar
        self._heard_of_it.set()
        if not self._main_leaves.wait(GRACE_SECONDS):
            sys.stdout.flush()
            self._leave(farewell.code)

    def _speaks(self) -> bool:
        """Process 0 does; where that one died, the first one of each computer."""
        return self._rank <= 1 or os.environ.get("LOCAL_RANK") == "0"


class _Peer:
    """A connection to another process, on which each side says one line: its farewell."""

    def __init__(self, rank: int, connection: socket.socket) -> None:
        self.rank, self.connection = rank, connection
        self._heard = b""

    def tell(self, farewell: Farewell) -> None:
        """Say farewell. Nothing happens if the other process is gone."""
        with suppress(OSError):
            _say(self.connection, {"code": farewell.code, "text": farewell.text})

    def hear(self) -> Farewell | None:
        """Read what there is to read; return the other's farewell once it is whole, or once it died."""
        try:
            more = self.connection.recv(1 << 16)
        except OSError:
            more = b""
        self._heard += more
        line, end, _ = self._heard.partition(b"\n")
        if end:
            said = json.loads(line)
            return Farewell(said["code"], said["text"] and f"process {self.rank}: {said['text']}")
        return None if more else Farewell(DIED, _DIED.format(rank=self.rank))


# --- finding each other ---


def _server(world: int) -> socket.socket:
    """Listen on a free port, to IPv4 and IPv6 where there are both."""
    try:
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=world, dualstack_ipv6=True)
    except (OSError, ValueError):
        return socket.create_server(("", 0), backlog=world)


def _accept(server: socket.socket, world: int, token: str) -> dict[int, socket.socket]:
    """Wait until the other processes have connected. Whoever does not know the token is hung up on."""
    peers: dict[int, socket.socket] = {}
    deadline = time.monotonic() + JOIN_SECONDS
    while len(peers) < world - 1:
        server.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            connection, _ = server.accept()
        except TimeoutError as error:
            missing = ", ".join(str(rank) for rank in range(1, world) if rank not in peers)
            raise ConfigError(
                f"process(es) {missing} of {world} did not connect to process 0 within {JOIN_SECONDS:g} "
                f"seconds; is there a firewall between the computers?"
            ) from error
        connection.settimeout(10.0)
        with connection.makefile("rb") as file:
            try:
                hello = json.loads(file.readline(1 << 10))
                known = secrets.compare_digest(hello["token"], token)
            except (OSError, ValueError, KeyError, TypeError):
                known = False
        if known:
            peers[hello["rank"]] = _kept_alive(connection)
        else:
            connection.close()
    return peers


def _connect(rank: int, port: int, token: str) -> socket.socket:
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        connection = socket.create_connection((host, port), timeout=JOIN_SECONDS)
        _say(connection, {"rank": rank, "token": token})
    except OSError as error:
        raise ConfigError(
            f"process {rank} cannot reach process 0 at {host}, port {port}: {error.strerror or error}."
        ) from error
    return _kept_alive(connection)


def _say(connection: socket.socket, message: dict[str, object]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _kept_alive(connection: socket.socket) -> socket.socket:
    """Let the system notice when the other computer is gone, as far as it can be told when to ask."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if name in dir(socket):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
