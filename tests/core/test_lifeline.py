"""Several processes tied together: whatever happens to one happens to all, soon, and is told once."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from library.core import lifeline
from library.core.errors import ConfigError, Stopped

ROOT = Path(__file__).resolve().parents[2]
WORLD = 3
# What the process with a rank does, once all are tied; a rank that is not listed waits, as in a collective.
WHAT = {
    "all end well": dict.fromkeys(range(WORLD), "pass"),
    "one meets a mistake": {1: "raise ConfigError('no such cat')"},
    "the first meets a mistake": {0: "raise ConfigError('no such cat')"},
    "all meet the same mistake": dict.fromkeys(range(WORLD), "raise ConfigError('no such cat')"),
    "one has a bug": {2: "raise ValueError('a bug')"},
    "one is killed": {1: "os.kill(os.getpid(), 9)"},
    "the first is killed": {0: "os.kill(os.getpid(), 9)"},
    "one is killed and the others' exchange breaks": {
        0: "time.sleep(0.3); raise RuntimeError('broken pipe')",
        1: "os.kill(os.getpid(), 9)",
        2: "time.sleep(0.1); raise RuntimeError('broken pipe')",
    },
    "all are stopped": dict.fromkeys(range(WORLD), "raise Stopped('stopped by hand')"),
    "one is stopped": {2: "raise Stopped('stopped by hand')"},
}
PROGRAM = """
import os, sys, time
from pathlib import Path
from library.core import lifeline
from library.core.entry import run_script
from library.core.errors import ConfigError, Stopped
lifeline.GRACE_SECONDS = 0.3
lifeline.HEARING_SECONDS = 2.0  # on a busy computer, processes meet the same thing at different times
rank, world, place = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
def agree(value):
    if rank == 0:
        place.with_suffix(".new").write_text(repr(value))
        place.with_suffix(".new").rename(place)
    while not place.exists():
        time.sleep(0.01)
    return __import__("ast").literal_eval(place.read_text())
def main():
    with lifeline.Lifeline.between(rank, world, agree):
        time.sleep(0.2)
        {what}
run_script(main)
"""


@dataclass(frozen=True)
class Outcome:
    """How a group of processes ended."""

    codes: list[int]
    told: str


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    """Every case of WHAT, all at the same time."""
    folder = tmp_path_factory.mktemp("lines")
    running = {}
    for number, (name, doing) in enumerate(WHAT.items()):
        programs = [PROGRAM.replace("{what}", doing.get(rank, "time.sleep(60)")) for rank in range(WORLD)]
        running[name] = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(rank), str(WORLD), str(folder / str(number))],
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, program in enumerate(programs)
        ]
    started = time.monotonic()
    ended = {}
    for name, group in running.items():
        told = "".join(process.communicate(timeout=55)[1] for process in group)
        ended[name] = Outcome([process.returncode for process in group], told.strip())
    assert time.monotonic() - started < 50  # nobody slept to the end
    return ended


def test_an_end_in_good_order(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["all end well"] == Outcome([0, 0, 0], "")


@pytest.mark.parametrize("case", ["one meets a mistake", "the first meets a mistake"])
def test_a_mistake_of_one_ends_all_with_its_code(outcomes: dict[str, Outcome], case: str) -> None:
    assert outcomes[case].codes == [2, 2, 2]
    who = "process 1: " if case.startswith("one") else ""
    assert outcomes[case].told == f"{who}error: no such cat"


def test_what_all_meet_is_told_once(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["all meet the same mistake"] == Outcome([2, 2, 2], "error: no such cat")
    assert outcomes["all are stopped"] == Outcome([75, 75, 75], "stopped by hand")
    assert outcomes["one is stopped"] == Outcome([75, 75, 75], "process 2: stopped by hand")


def test_it_is_told_before_the_others_may_leave(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A launcher ends process 0 as soon as another one has left."""
    told: list[str] = []
    monkeypatch.setattr(lifeline._Peer, "tell", lambda *_: told.append(capsys.readouterr().err))
    monkeypatch.setattr(lifeline, "LINGER_SECONDS", 0.0)
    here, there = socket.socketpair()
    with pytest.raises(SystemExit) as left, there, lifeline.Lifeline(0, {1: here}):
        raise ConfigError("no such cat")
    assert told == ["error: no such cat\n"]
    assert left.value.code == ConfigError.exit_code


@pytest.mark.parametrize("code", [0, Stopped.exit_code])
def test_whoever_has_heard_all_still_says_farewell(code: int) -> None:
    """The others would take this process for dead, and end with another code."""
    here, there = socket.socketpair()
    with there:
        there.sendall(b'{"code": 0, "text": ""}\n')
        with suppress(SystemExit), lifeline.Lifeline(0, {1: here}) as line:
            assert line._all_heard.wait(5)
            time.sleep(0.1)
            if code:
                raise Stopped("stopped by hand")
        assert json.loads(there.recv(100))["code"] == code
        assert there.recv(100) == b""


def test_nobody_waits_for_an_answer_of_who_has_left() -> None:
    here, there = socket.socketpair()
    started = time.monotonic()
    with there:
        there.sendall(b'{"code": 0, "text": ""}\n')
        with pytest.raises(ConfigError, match="no such cat"), lifeline.Lifeline(1, {0: here}):
            raise ConfigError("no such cat")
    assert time.monotonic() - started < 5


def test_a_bug_is_told_with_its_traceback(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["one has a bug"]
    assert outcome.codes == [1, 1, 1]
    assert outcome.told.startswith("process 2: Traceback")
    assert outcome.told.count("ValueError: a bug") == 1


@pytest.mark.parametrize(
    ("case", "victim"),
    [("one is killed", 1), ("the first is killed", 0), ("one is killed and the others' exchange breaks", 1)],
)
def test_a_killed_process_ends_all(outcomes: dict[str, Outcome], case: str, victim: int) -> None:
    codes = [-9 if rank == victim else 1 for rank in range(WORLD)]
    assert outcomes[case].codes == codes
    assert outcomes[case].told.count("died without a word") == 1
    assert outcomes[case].told.startswith(f"error: process {victim} died without a word")
    assert "broken pipe" not in outcomes[case].told


def test_strangers_are_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    agreed: list[object] = []

    def agree(value: object) -> object:
        port, token = value
        for hello in (b"GET / HTTP/1.1\n", b'{"rank": 1, "token": "guessed"}\n'):
            strangers.append(socket.create_connection(("127.0.0.1", port)))
            strangers[-1].sendall(hello)
        agreed.append(value)

        def join() -> None:
            with lifeline.Lifeline.between(1, 2, lambda _: value):
                pass

        threads.append(threading.Thread(target=join))
        threads[-1].start()
        return value

    strangers, threads = [], []
    with lifeline.Lifeline.between(0, 2, agree):
        assert strangers[0].recv(10) == strangers[1].recv(10) == b""
    threads[0].join(5)
    for stranger in strangers:
        stranger.close()


def test_a_process_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "JOIN_SECONDS", 0.2)
    with pytest.raises(ConfigError, match=r"process\(es\) 1, 2 of 3 did not connect"):
        lifeline.Lifeline.between(0, 3, lambda value: value)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ConfigError, match=f"process 1 cannot reach process 0 at 127.0.0.1, port {port}"):
        lifeline.Lifeline.between(1, 3, lambda value: [port, "token"])
