"""Module dropout, and what it must not have a say in: plans, and measured steps."""

from __future__ import annotations

import pytest
import torch

from library.options.swap import SwapOptions
from library.training.look.measure import RealSteps
from library.training.look.memory_estimate import Manner, MemoryEstimate
from tests.training.nano_runs import Runs

NONE = SwapOptions()
OFTEN = ("--network_args", "module_dropout=0.9")
TEXTS = "--cache_text_encoder_outputs"


@pytest.fixture(scope="module")
def runs(nano, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    torch.set_num_threads(1)
    return Runs(nano, tmp_path_factory.mktemp("data"), of_networks=True)


@pytest.mark.parametrize("family", ["lumina", "kandinsky"])
def test_a_plan_has_every_layer_in_it(runs: Runs, family: str) -> None:
    context = runs.context(family, *OFTEN)
    totals = []
    for each in (context, context, context, runs.context(family)):
        parts = MemoryEstimate(each.trainer, each).training(Manner(None, "none"), NONE)
        totals.append(sum(parts.values()))
    *dropping, plain = totals
    assert dropping == pytest.approx([dropping[0]] * 3, rel=1e-4)
    assert dropping[0] >= plain


def test_a_plan_of_a_text_encoder_that_is_trained(runs: Runs) -> None:
    words = list(runs.words)
    runs.words.remove(TEXTS)
    try:
        context = runs.context("lumina", *OFTEN, "--network_train_text_encoder")
    finally:
        runs.words[:] = words
    estimate = MemoryEstimate(context.trainer, context)
    assert sum(estimate.training(Manner(None, "full"), NONE).values()) > 0


def test_measured_steps_leave_nothing_out(runs: Runs) -> None:
    context = runs.context("lumina", *OFTEN)
    torch.manual_seed(0)
    real = RealSteps(context, MemoryEstimate(context.trainer, context, kind="cpu"), "none")
    before = [weight.detach().clone() for weight in real.weights() if weight.requires_grad]
    real.step()
    after = [weight for weight in real.weights() if weight.requires_grad]
    moved = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
    assert sum(moved) == len(moved) / 2  # `up`, all of them; `down` has no gradient while `up` is zero
