"""What the tests of this folder share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.reliability import legs
from tests.warm_python import ColdPython, Script, WarmPython


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of five pictures in batches of two: three steps an epoch."""
    return legs.write_dataset(tmp_path_factory.mktemp("reliability") / "photos é")


@pytest.fixture
def train(
    nano, config: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Return a function that trains into a folder with more flags: `train(output, "--ema")`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(config.parent.parent))

    def run(output: Path, *flags: str, dataset: Path = config) -> Path:
        legs.train(legs.words(nano, dataset, output, *flags))
        return output

    return run


@pytest.fixture
def start(
    nano, config: Path, whole: Path, python: WarmPython | ColdPython
) -> Iterator[Callable[..., Script]]:
    """Return a function that starts the script in another process; what still runs at the end is killed."""
    started: list[Script] = []
    environment = os.environ | {"XDG_CACHE_HOME": str(config.parent.parent), "OMP_NUM_THREADS": "1"}

    def launch(output: Path, *flags: str) -> Script:
        words = legs.words(nano, config, output, *flags)
        started.append(python.start(["lumina_train_network.py", *words], environment))
        return started[-1]

    yield launch
    for script in started:
        script.kill()
        script.join()


@pytest.fixture(scope="session")
def whole(nano, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an uninterrupted run of six steps with EMA."""
    output = tmp_path_factory.mktemp("whole")
    legs.train(legs.words(nano, config, output, "--ema"))
    return output
