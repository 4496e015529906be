"""Memory that a step frees is there for the next one."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import resource, sys, torch
from library.core.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    kept = [torch.ones(size << 18) * 2 for size in range(1, 14)]
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(pages)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back so eagerly")
def test_a_step_does_not_fetch_its_memory_again():
    """Without the call, memory above glibc's threshold (fixed here: it drifts by itself) is fetched anew."""

    def pages(mode):
        command = [sys.executable, "-c", SCRIPT, mode]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=environment)
        return int(done.stdout)

    assert pages("keep") < pages("default") / 4
