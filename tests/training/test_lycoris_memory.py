"""What --plan_memory finds of steps with the LyCORIS kinds is what was foretold of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from library.options.swap import SwapOptions
from library.training.look.measure import _measured_steps
from library.training.look.memory_estimate import Manner, MemoryEstimate
from tests.training.nano_runs import Runs


@pytest.fixture(scope="module")
def runs(nano, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    torch.set_num_threads(1)
    return Runs(nano, tmp_path_factory.mktemp("data"), of_networks=True)


@pytest.fixture
def rubbish_stays() -> Iterator[None]:
    """What only the garbage collector would free is there to the end."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    ("family", "algo", "mode"),
    [
        *(("lumina", "lora", "none"), ("lumina", "loha", "selective")),
        *(("lumina", "diag-oft", "full"), ("kandinsky", "lokr", "none")),
    ],
)
@pytest.mark.usefixtures("rubbish_stays")
def test_the_hollow_model_that_the_package_was_asked_with_does_not_count(
    runs: Runs, family: str, algo: str, mode: str
) -> None:
    words = ("--network_module=lycoris.kohya", "--mixed_precision=bf16", "--network_args", f"algo={algo}")
    context = runs.context(family, *words)
    estimate = MemoryEstimate(context.trainer, context, kind="cpu")
    foretold = sum(estimate.bytes_of_steps(Manner(None, mode), SwapOptions()).values())
    found, _ = _measured_steps(context, estimate, mode)
    assert foretold == pytest.approx(found, rel=0.05)
