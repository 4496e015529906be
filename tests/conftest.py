"""What many tests share: the nano models, made once, and a way to run the scripts as a user does."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# Property tests measure behaviour, not a shared machine's speed; in CI they try the same examples every time.
settings.register_profile("house", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("house")


@dataclass(frozen=True)
class Result:
    """What a script run left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def nano(tmp_path_factory):
    """The nano models in their original layout: `.dit`, `.gemma2` and `.ae` are paths."""
    from tools.make_nano_models import make_nano_models

    return make_nano_models(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="session")
def run_script(tmp_path_factory):
    """Run Python in the repository, in a process of its own: `run_script("x.py", "--flag", ...)`."""
    cache = tmp_path_factory.mktemp("cache")

    def run(script, *arguments, **environment):
        variables = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "XDG_CACHE_HOME": str(cache),
        }
        done = subprocess.run(
            [sys.executable, script, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=variables | environment,
            stdin=subprocess.DEVNULL,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run
