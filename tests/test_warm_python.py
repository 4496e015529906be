"""A script that is forked from a warm Python does what it does in a Python of its own."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from tests.warm_python import ColdPython, WarmPython

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="scripts are forked on Linux only")

BEGIN = "import atexit, os, sys, threading, time\natexit.register(print, 'at exit')\n"
ENDS = {
    "well": "print(__name__, sys.argv, os.getcwd(), os.environ['COLOUR'], len(os.environ), repr(input))",
    "with a number": "sys.exit(7)",
    "with words": "sys.exit('that was all')",
    "with a bug": "raise ValueError('a bug')",
    "by a signal": "import signal; os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)",
    "after its threads": "threading.Thread(target=lambda: (time.sleep(0.1), print('a thread'))).start()",
    "without input": "print(sys.stdin.read(), __file__, sys.path[0]); print('told', file=sys.stderr)",
}


def outcome(python: WarmPython | ColdPython, words: list[str]) -> tuple[int, str, str]:
    """Return the exit code, what was written, and the last line of what was told."""
    environment = {"PATH": os.environ["PATH"], "COLOUR": "green", "LC_ALL": "C.UTF-8"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        script = python.start(words, environment, out.fileno(), err.fileno())
        script.join()
        out.seek(0), err.seek(0)
        return script.exitcode, out.read(), err.read().rpartition("\n")[0].rpartition("\n")[2]


@pytest.mark.parametrize("end", ENDS)
def test_it_ends_the_same(python: WarmPython | ColdPython, tmp_path: Path, end: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(BEGIN + ENDS[end])
    words = [str(script), "one", "two words"]
    assert outcome(python, words) == outcome(ColdPython(), words)


def test_what_a_launcher_starts_are_its_own_children(python: WarmPython | ColdPython, tmp_path: Path) -> None:
    child, launcher = tmp_path / "child.py", tmp_path / "launching.py"
    one_write = "sys.stdout.write(f'{os.environ[\"RANK\"]} {os.getppid()}\\n')"  # the other one writes too
    child.write_text(f"import os, sys; {one_write}; sys.exit(5)")
    launcher.write_text(
        "import os, subprocess, sys\n"
        f"command = [sys.executable, '-u', {str(child)!r}]\n"
        "started = [subprocess.Popen(command, env=os.environ | {'RANK': str(n)}) for n in range(2)]\n"
        "print([process.wait() for process in started], os.getpid())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for starter in (python, ColdPython()):
        with tempfile.TemporaryFile("w+") as out:
            script = starter.start(["-m", "launching"], environment, out.fileno())
            script.join()
            out.seek(0)
            told = sorted(out.read().splitlines())
        assert script.exitcode == 0
        assert told == [f"0 {script.pid}", f"1 {script.pid}", f"[5, 5] {script.pid}"]
