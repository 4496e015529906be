"""AdamW that looks at each matrix less often is torch's AdamW, bit for bit, in steps and in states."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from library.options.optimizer import OptimizerOptions
from library.training.optim.adamw import LeanAdamW
from library.training.optim.optimizer import create_optimizer, export_state, import_state

SHAPES = ((4, 48), (33, 4), (7,), (96, 5))
SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in SHAPES]


def groups(parameters: Sequence[nn.Parameter]) -> list[dict[str, object]]:
    """Two groups, as LoRA+ has them; magnitudes of a DoRA do not decay."""
    return [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.1, "weight_decay": 0.0}]


def train(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    steps: range,
    left_out: Sequence[tuple[int, int]] = (),
) -> None:
    """Make steps; `left_out` are pairs of a step and a parameter that has no gradient in it."""
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        for number, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
            parameter.grad = None if (step, number) in left_out else gradient
        optimizer.step()


def assert_alike(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("left_out", [(), ((0, 1),), ((3, 0), (4, 3))], ids=["all", "at first", "later"])
def test_steps_are_those_of_torchs_class(dtype: torch.dtype, left_out: Sequence[tuple[int, int]]) -> None:
    ours, theirs = weights(dtype), weights(dtype)
    lean = LeanAdamW(groups(ours), **SETTINGS)
    whole = torch.optim.AdamW(groups(theirs), fused=True, **SETTINGS)
    for optimizer, parameters in ((lean, ours), (whole, theirs)):
        train(optimizer, parameters, range(8), left_out)
    assert_alike(ours, theirs)
    (mine, _), (others, _) = export_state(lean), export_state(whole)
    assert mine.keys() == others.keys()
    assert_alike(list(mine.values()), list(others.values()))


@pytest.mark.parametrize("left_out", [(), ((1, 2),)], ids=["all", "one left out"])
@pytest.mark.parametrize("kinds", [("lean", "torch"), ("torch", "lean"), ("lean", "lean")], ids="-".join)
def test_either_goes_on_from_a_state_of_the_other(kinds: tuple[str, str], left_out: object) -> None:
    def make(kind: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        more = {} if kind == "lean" else {"fused": True}
        return {"lean": LeanAdamW, "torch": torch.optim.AdamW}[kind](groups(parameters), **more, **SETTINGS)

    straight, broken = weights(), weights()
    train(make("torch", straight), straight, range(6), left_out)
    first = make(kinds[0], broken)
    train(first, broken, range(3), left_out)
    second = make(kinds[1], broken)
    import_state(second, *export_state(first))
    train(second, broken, range(3, 6))
    assert_alike(broken, straight)


def test_it_is_taken_where_it_can_do_what_is_asked_for() -> None:
    def kind(*args: str) -> type:
        options = OptimizerOptions(optimizer_type="AdamW", optimizer_args=args)
        return type(create_optimizer([{"params": weights(), "lr": 1e-3}], options))

    assert kind() is kind("weight_decay=0.1", "betas=0.9,0.99") is LeanAdamW
    assert kind("amsgrad=True") is kind("fused=False") is kind("foreach=True") is torch.optim.AdamW
