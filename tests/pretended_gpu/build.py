"""Builds the device's library from its sources, once for each version of them and of torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

_HERE = Path(__file__).parent
_SOURCES = ("order.h", "device.cpp")
COMPILER = "g++"


def can_build() -> bool:
    """Whether there is a compiler."""
    return shutil.which(COMPILER) is not None


def library() -> Path:
    """Return the library; torch is not imported, because the library must be there before it."""
    content = b"".join((_HERE / name).read_bytes() for name in _SOURCES) + version("torch").encode()
    folder = Path(tempfile.gettempdir()) / f"pretended_gpu_{os.getuid()}"
    path = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}")
        _compile(half)
        half.replace(path)
    return path


def _compile(target: Path) -> None:
    torch = Path(find_spec("torch").origin).parent
    include, libraries = torch / "include", torch / "lib"
    command = [COMPILER, "-O1", "-DNDEBUG", "-shared", "-fPIC", "-std=c++20", "-o", str(target)]
    command += ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    command += [str(_HERE / "device.cpp"), f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    command += ["-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
