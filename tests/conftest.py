"""What many tests share: the nano models, made once, and a way to run the scripts as a user does."""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from tests.warm_python import ColdPython, WarmPython

ROOT = Path(__file__).resolve().parents[1]

# Property tests measure behaviour, not a shared machine's speed; in CI they try the same examples every time.
settings.register_profile("house", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("house")
# Of every script: one thread, no network, no warning, and no GPU, where not all is the same bit for bit.
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
QUIET |= {"CUDA_VISIBLE_DEVICES": ""}
os.environ["ACCELERATE_USE_CPU"] = "true"  # and of runs within a test; tests of a GPU name it


@dataclass(frozen=True)
class Result:
    """What a script run left behind."""

    code: int
    out: str
    err: str


def pytest_runtest_setup(item):
    """Leave out what needs a GPU where there is none; `test_pretended_gpu.py` runs it all the same."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU")


@pytest.fixture(scope="session")
def nano(tmp_path_factory):
    """The nano models in their original layout: `.dit`, `.gemma2` and `.ae` are paths."""
    from tools.make_nano_models import make_nano_models

    return make_nano_models(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="session")
def python():
    """What starts scripts: where it can be, a Python that has imported the library; see warm_python.py."""
    python = WarmPython(os.environ | QUIET) if sys.platform == "linux" else ColdPython()
    yield python
    python.close()


@pytest.fixture(scope="session")
def run_script(tmp_path_factory, python):
    """Run a script in the repository, in a process of its own: `run_script("x.py", "--flag", ...)`.

    It starts with the library imported, unless `cold`, or variables are given, or words for Python itself.
    """
    cache = tmp_path_factory.mktemp("cache")

    def run(script, *arguments, cold=False, **variables):
        words = [str(script), *map(str, arguments)]
        environment = os.environ | QUIET | {"XDG_CACHE_HOME": str(cache)} | variables
        fresh = cold or variables or not words[0].endswith(".py")
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            starter = ColdPython() if fresh else python
            process = starter.start(words, environment, out.fileno(), err.fileno())
            process.join()
            out.seek(0), err.seek(0)
            return Result(process.exitcode, out.read(), err.read())

    return run
