"""A Python that has imported what the scripts import, and forks a process for each script that is to be run.

What is forked runs the script as `python script.py ...` does, with its own arguments, environment and output.
Three things differ: modules are there before the script asks for them, variables that are read by an import
have the values of the server, and nothing is taken down after the last words. Tests about any of this start a
Python of their own. The server calls nothing of torch, so it has no threads that a fork would lose.

A launcher is forked like a script. The scripts that it starts are its own children, but forked as well: by a
helper without threads, which is forked from the launcher before it begins.

    python warm_server.py DESCRIPTOR, as WarmPython in warm_python.py does
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# With all that these import: what training, drawing and launching need.
MODULES = (
    *("library.training.run", "library.training.context", "library.training.look.dry_run"),
    *("library.models.flux_vae", "library.models.gemma2", "library.models.lumina2"),
    *("library.models.kandinsky5", "library.models.kandinsky5_text", "library.inference.drawing"),
    *("networks.lora", "networks.lycoris.network", "sentencepiece.sentencepiece_model_pb2"),
    *("accelerate.commands.config", "torch.distributed.launcher.api"),
)
_NUMBER = struct.Struct("i")
_SET_NAME, _SET_CHILD_SUBREAPER = 15, 36  # of prctl


def main() -> None:
    """Serve, and in a process that is to be one, be a script or a launcher."""
    sys.path[0] = str(ROOT)
    subprocess.Popen = _ForkingPopen  # before it is imported by name
    for module in MODULES:
        with suppress(Exception):  # a script that needs it will tell of it
            importlib.import_module(module)
    gc.freeze()  # what is there now stays, so collecting need not look at it, nor copy it
    request = _served(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        _end(_exit_code(request["words"]))


def _served(line: socket.socket) -> dict | None:
    """Start a process for each request; return the request there, and None here when there are no more."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(line, 2**20, 4)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # those that have ended are forgotten
                pass
        if not message:
            return None
        request = json.loads(message)
        if os.fork() == 0:
            line.close()
            if "parent" in request:
                _leave_to(request["parent"], descriptors[0])
            else:
                _attend(*descriptors)
            for place, descriptor in enumerate(descriptors[1:]):
                os.dup2(descriptor, place)
            for descriptor in descriptors:
                os.close(descriptor)
            os.environ.clear()
            os.environ.update(request["environment"])
            if "RANK" in os.environ:
                _prctl(_SET_NAME, f"rank {os.environ['RANK']}".encode())
            return request
        for descriptor in descriptors:
            os.close(descriptor)


def _attend(channel: int, *others: int) -> None:
    """Fork once more: return there; here, tell how that process ends."""
    process = os.fork()
    if process == 0:
        return
    for descriptor in others:  # whoever reads what that process writes waits for the last to close it
        os.close(descriptor)
    os.write(channel, _NUMBER.pack(process))
    _, status = os.waitpid(process, 0)
    os.write(channel, _NUMBER.pack(os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _leave_to(parent: int, channel: int) -> None:
    """Fork once more and end, so that what returns there is a child of the launcher, and tell its number."""
    if os.fork():
        os._exit(0)
    os.setsid()
    while os.getppid() != parent:
        time.sleep(0.001)
    os.write(channel, _NUMBER.pack(os.getpid()))


def _exit_code(words: list[str]) -> int:
    """Do what Python does with these words, and return what it would end with."""
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    try:
        if words[0] != "-m":
            sys.argv = words
            sys.path[0] = str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
        elif (launched := _scripts_of_a_launcher()) is not None:
            return _exit_code(launched)
        else:
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def _end(code: int) -> None:
    """End as an interpreter does, but without taking down what was imported, which takes half a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


# --- launchers ---


def _scripts_of_a_launcher() -> list[str] | None:
    """Fork the helper; return None here, and in a process that it forks the words of a script."""
    line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _prctl(_SET_CHILD_SUBREAPER, 1)  # orphans among the descendants become children
    if os.fork() == 0:
        line.close()
        request = _served(theirs)
        if request is None:
            os._exit(0)
        return request["words"]
    theirs.close()
    _ForkingPopen.line = line
    return None


class _ForkingPopen(subprocess.Popen):
    """In a launcher, has scripts of Python forked by the helper; starts everything else as ever."""

    line: socket.socket | None = None  # to the helper, in a launcher

    def __init__(self, args: Sequence[str], env: Mapping[str, str] | None = None, **named: object) -> None:
        words = [word for word in args[1:] if word != "-u"]
        if self.line is None or args[0] != sys.executable or not words[0].endswith(".py"):
            super().__init__(args, env=env, **named)
            return
        request = {"words": words, "environment": dict(env or os.environ), "parent": os.getpid()}
        channel, theirs = socket.socketpair()
        with channel, theirs:
            streams = [named.get(name) or own for name, own in _STREAMS.items()]
            descriptors = [theirs.fileno(), *(stream.fileno() for stream in streams)]
            socket.send_fds(self.line, [json.dumps(request).encode()], descriptors)
            self.pid = _NUMBER.unpack(channel.recv(_NUMBER.size, socket.MSG_WAITALL))[0]
        self.args, self.returncode = args, None
        self.stdin = self.stdout = self.stderr = None
        self._waitpid_lock, self._child_created = threading.Lock(), True  # what waiting for it needs


_STREAMS = {"stdin": sys.stdin, "stdout": sys.stdout, "stderr": sys.stderr}


def _prctl(option: int, value: int | bytes) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main()
