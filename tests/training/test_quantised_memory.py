"""What steps on a quantised model take is what was foretold, in every scheme and with products in 8 bits."""

from __future__ import annotations

import pytest
import torch

from library.nn.weights.quant import quant_layers
from library.options.swap import SwapOptions
from library.training.look.measure import RealSteps
from library.training.look.memory_estimate import Manner, MemoryEstimate
from tests.training.nano_runs import Runs, weight_bytes_of
from tests.training.test_memory_estimate import allocated

ACTIVATIONS = "activations of the largest batch"


@pytest.fixture(scope="module")
def runs(nano, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    torch.set_num_threads(1)
    return Runs(nano, tmp_path_factory.mktemp("data"), of_networks=True)


@pytest.mark.parametrize(
    ("scheme", "fast", "mode", "swapped"),
    [
        *(("fp8", False, "selective", 0), ("int8", False, "full", 3)),
        *(("int4", False, "full", 0), ("nf4", False, "none", 3)),
        *(("fp8", True, "full", 3), ("int8", True, "none", 0)),
    ],
    ids=lambda value: {False: "restored", True: "in 8 bits"}[value] if isinstance(value, bool) else None,
)
@pytest.mark.parametrize("family", ["lumina", "kandinsky"])
def test_a_step_on_a_quantised_model_takes_what_was_foretold(
    runs: Runs, family: str, scheme: str, fast: bool, mode: str, swapped: int
) -> None:
    """To the word of the allocator: all of it, and activations without the weights, which hide errors."""
    words = ("--mixed_precision=bf16", f"--base_quant={scheme}", f"--blocks_to_swap={swapped}")
    context = runs.context(family, *words, *(["--quant_matmul"] if fast else []))
    estimate, swap = MemoryEstimate(context.trainer, context, kind="cpu"), SwapOptions(blocks_to_swap=swapped)
    manner = Manner(scheme, mode)
    parts = estimate.bytes_of_steps(manner, swap) | estimate.in_computer(manner, swap)
    layers = quant_layers(estimate.simulation(scheme).model).values()
    assert layers and all(layer.multiplies_in_8_bits == fast for layer in layers)
    real = RealSteps(context, estimate, mode)
    there = weight_bytes_of(real)

    def two_steps() -> None:
        real.step()
        real.step()  # with all that the first one made

    found = there + allocated(two_steps)
    rest = sum(parts.values()) - parts[ACTIVATIONS]
    assert sum(parts.values()) == pytest.approx(found, rel=0.05)
    assert parts[ACTIVATIONS] == pytest.approx(found - rest, rel=0.1)
