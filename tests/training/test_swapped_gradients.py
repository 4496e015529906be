"""A model some of whose blocks are swapped is trained by the updater as one that lies on the device."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from library.core.dist import Processes
from library.data.batch import Batch
from library.data.items import Draw
from library.nn.swap.block_swap import BlockSwap
from library.nn.swap.gradient_return import GradientReturn
from library.options.ema import EmaOptions
from library.training.fused_backward import FusedBackward
from library.training.gradients import PlainGradients
from library.training.optim.one_by_one import OneByOne
from library.training.output.ema import Ema
from library.training.swapped_gradients import SwappedGradients
from library.training.update import Share, Updater, UpdateSettings
from tests.models.lumina2_pairs import make_inputs
from tests.nn.test_two_way_swap import assert_alike, make_model
from tests.strict_copier import StrictCopier

CPU = torch.device("cpu")


class Objective:
    """Losses of a model's outputs for fixed inputs; `bad` spoils them."""

    def __init__(self, model) -> None:
        self.inputs = make_inputs(model.params, (9, 4), (8, 6))
        self.model, self.bad = model, False

    def outputs(self) -> Tensor:
        return self.inputs.ours(self.model).float()

    def training_losses(self, batch: Batch) -> Tensor:
        factor = float("nan") if self.bad else 1.0 + batch.draws[0].micro
        return factor * self.outputs().flatten(1).square().mean(1)

    def sigmas(self, batch: Batch) -> Tensor:
        return torch.tensor([0.25, 0.75])


def shares(step: int, micros: int) -> list[Share]:
    return [
        Share(Batch(draws, ("a.png", "b.png"), ("", ""), torch.ones(2)), 2)
        for micro in range(micros)
        if (draws := tuple(Draw(slot, 0, 0, step, micro, slot) for slot in range(2)))
    ]


def trained(
    *, swaps: bool, dtype=torch.float32, fused=False, beside=False, micros=2, bad=(), steps=4
) -> list[Tensor]:
    """Norms, losses, weights and averages of a short run with pictures of the average in between."""
    model = make_model(n_layers=2).to(dtype)
    model.t_embedder.float()
    model.runner.keep("full", every=2)
    ring = BlockSwap(model.runner.blocks[1:], CPU, copier=StrictCopier()) if swaps else None
    model.runner.ring = ring
    parameters = list(model.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, foreach=False)
    if dtype == torch.bfloat16 or fused:
        optimizer = OneByOne(optimizer, model.named_parameters())
    if fused:
        gradients = FusedBackward(optimizer, CPU, max_grad_norm=0.01, ring=ring, beside=beside)
    elif ring:
        gradients = SwappedGradients(GradientReturn(ring), parameters, CPU)
    else:
        gradients = PlainGradients(parameters, CPU)
    settings = UpdateSettings(seed=1, max_grad_norm=0.01, on_nan="skip")
    objective = Objective(model)
    updater = Updater(objective, gradients, optimizer, Processes.start(), settings)
    settle = {"settle": ring.bring_home} if ring else {}
    ema = Ema(model.named_parameters(), EmaOptions(ema=True), **settle)
    found = []
    for step in range(steps):
        objective.bad = step in bad
        result = updater.step(step, shares(step, micros))
        assert result.updated == (step not in bad)
        assert result.grad_norm > 0.02 or not result.updated  # so the gradient is clipped
        found.append(torch.tensor([result.loss, result.grad_norm]).nan_to_num())
        ema.update(step + 1)
        with torch.no_grad():
            found.append(objective.outputs())
            with ema.in_place():
                found.append(objective.outputs())
            found.append(objective.outputs())
    if ring:
        ring.bring_home()
    return [*found, *ema.export_state().values(), *(p.detach() for p in parameters)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bad": (1,)},
        {"dtype": torch.bfloat16},
        {"fused": True, "micros": 1},
        {"fused": True, "micros": 1, "dtype": torch.bfloat16},
        {"fused": True, "micros": 1, "bad": (1,)},
        {"fused": True, "micros": 1, "bad": (1,), "beside": True},
        {"fused": True, "micros": 1, "dtype": torch.bfloat16, "beside": True},
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_swapping_changes_no_bit(options) -> None:
    assert_alike(trained(swaps=True, **options), trained(swaps=False, **options))


def test_the_double_shows_an_average_that_is_put_into_copies(monkeypatch) -> None:
    wanted = trained(swaps=False, steps=2)
    init = Ema.__init__
    monkeypatch.setattr(Ema, "__init__", lambda self, named, options, settle=None: init(self, named, options))
    with pytest.raises(AssertionError):
        assert_alike(trained(swaps=True, steps=2), wanted)


@dataclasses.dataclass
class Doubling:
    """Two processes that do the same."""

    world: int = 2
    asked: int = 0

    def sum(self, tensor: Tensor) -> Tensor:
        self.asked += 1
        return tensor * 2

    def sum_gradients(self, parameters) -> None:
        for parameter in parameters:
            parameter.grad = self.sum(
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )


@pytest.mark.parametrize("pictures", [True, False])
def test_processes_exchange_what_came_home(pictures) -> None:
    found = []
    for swaps in (False, True):
        model = make_model(n_layers=2)
        ring = BlockSwap(model.runner.blocks[1:], CPU, copier=StrictCopier()) if swaps else None
        model.runner.ring = ring
        parameters = list(model.requires_grad_(True).parameters())
        plain = PlainGradients(parameters, CPU)
        gradients = SwappedGradients(GradientReturn(ring), parameters, CPU) if ring else plain
        if pictures:
            Objective(model).outputs().square().mean().backward()
        processes = Doubling()
        gradients.collect(processes)
        assert processes.asked == len(parameters)
        found.append([gradients.norm(), *(p.grad.clone() for p in parameters)])
        gradients.clear()
        assert all(p.grad is None for p in parameters)
    assert_alike(*found)
    assert bool(found[0][0] > 0) == pictures
