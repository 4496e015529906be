"""The gradients of a step as a whole, and what the updater does with those that move weights early."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from library.core import dist
from library.core.dist import Processes
from library.core.errors import NonFiniteError
from library.data.batch import Batch
from library.data.items import Draw
from library.training.gradients import PlainGradients, norms_of
from library.training.update import PartlyUpdatedError, Share, Updater, UpdateSettings

CPU = torch.device("cpu")


class Two(Processes):
    """This process and another one with the same gradients; takes note of how much they exchange at once."""

    sizes: list[int] = []

    @property
    def world(self) -> int:
        return 2

    @property
    def device(self) -> torch.device:
        return CPU

    def sum(self, tensor: Tensor) -> Tensor:
        self.sizes.append(tensor.numel())
        return tensor * 2


@pytest.fixture
def two() -> Iterator[Two]:
    Two.sizes.clear()
    yield Two(accelerator=None)  # type: ignore[arg-type]


def parameters() -> list[nn.Parameter]:
    """Of two dtypes; the last has no gradient."""
    draw = torch.Generator().manual_seed(1)
    shapes = [
        ((4, 48), torch.float32),
        ((7,), torch.bfloat16),
        ((33, 3), torch.float32),
        ((5,), torch.float32),
    ]
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in shapes]
    for parameter in made[:-1]:
        parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
    return made


def test_norm_and_scale_are_of_all_gradients_together() -> None:
    weights = parameters()
    gradients = PlainGradients(weights, CPU)
    gradients.collect(Processes.start())
    found = torch.cat([weight.grad.double().flatten() for weight in weights[:-1]])
    norm = gradients.norm()
    assert norm.dtype == torch.float32 and norm.shape == ()
    assert norm.item() == pytest.approx(found.norm().item(), rel=1e-6)
    gradients.scale(0.5)  # which is exact
    assert torch.equal(torch.cat([w.grad.double().flatten() for w in weights[:-1]]), found / 2)
    assert weights[-1].grad is None
    gradients.clear()
    assert all(weight.grad is None for weight in weights)


def test_without_any_gradient_the_norm_is_nothing() -> None:
    gradients = PlainGradients([nn.Parameter(torch.zeros(3))], CPU)
    gradients.collect(Processes.start())
    assert gradients.norm().item() == 0.0
    gradients.scale(2.0)


def test_what_is_frozen_is_left_alone() -> None:
    frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    PlainGradients([frozen], CPU).collect(Two(accelerator=None))  # type: ignore[arg-type]
    assert frozen.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_large_weight_is_not_blurred(dtype: torch.dtype) -> None:
    """torch's own is a part in 1000 too small here."""
    weight = torch.randn(20_000_000, generator=torch.Generator().manual_seed(1)).mul_(1e-3).to(dtype)
    exact = weight.double().norm().item()
    small = torch.ones(4)
    assert norms_of([weight.view(-1, 1000), small]).tolist() == pytest.approx([exact, 2.0], rel=2e-5)


@pytest.mark.parametrize("limit", [1, 5, 64, 192, 200, 2**26])
def test_processes_exchange_gradients_piece_by_piece(two: Two, limit: int, monkeypatch) -> None:
    monkeypatch.setattr(dist, "_PIECE", limit)
    weights, alone = parameters(), parameters()
    PlainGradients(weights, CPU).collect(two)
    for weight, other in zip(weights[:-1], alone, strict=False):
        assert torch.equal(weight.grad, 2 * other.grad)
    assert torch.equal(weights[-1].grad, torch.zeros(5))  # as the other process may have one
    assert max(two.sizes) <= limit and sum(two.sizes) == sum(weight.numel() for weight in weights)
    fp32 = sum(weight.numel() for weight in weights if weight.dtype == torch.float32)
    assert len(two.sizes) == math.ceil(fp32 / limit) + math.ceil(7 / limit)


def test_a_gradient_that_lies_otherwise_in_memory_is_summed_too(two: Two) -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    weight.grad = torch.arange(12.0).view(4, 3).t()
    PlainGradients([weight], CPU).collect(two)
    assert torch.equal(weight.grad, 2 * torch.arange(12.0).view(4, 3).t())


# --- the updater ---


class Line:
    """Losses of a line through two numbers, of which a test may spoil loss or gradient."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.tensor([0.5, -0.5]))
        self.factor, self.slope = 1.0, 1.0
        self.weight.register_hook(lambda gradient: gradient * self.slope)

    def training_losses(self, batch: Batch) -> Tensor:
        return (self.weight * self.factor - 1.0) ** 2

    def sigmas(self, batch: Batch) -> Tensor:
        return torch.tensor([0.25, 0.75])


class Fused(PlainGradients):
    """A weight moves by its gradient, where that is finite, as soon as it is there."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__([weight], CPU)
        self.largest = 0.0
        weight.register_post_accumulate_grad_hook(self._move)

    @property
    def moves_weights(self) -> bool:
        return True

    def norm(self) -> Tensor:
        return torch.tensor(self.largest)

    def scale(self, factor: float) -> None:
        raise AssertionError("nothing is left to scale")

    @torch.no_grad()
    def _move(self, weight: Tensor) -> None:
        self.largest = weight.grad.norm().item()
        if math.isfinite(self.largest):
            weight -= 0.1 * weight.grad
        weight.grad = None


def updater(line: Line, gradients: PlainGradients, *, on_nan: str = "stop", limit: float = 1.0) -> Updater:
    optimizer = torch.optim.SGD([line.weight], lr=0.1)
    settings = UpdateSettings(seed=1, max_grad_norm=limit, on_nan=on_nan)
    return Updater(line, gradients, optimizer, Processes.start(), settings)


def shares() -> list[Share]:
    draws = tuple(Draw(slot, 0, 0, 0, 0, slot) for slot in range(2))
    return [Share(Batch(draws, ("good.png", "bad.png"), ("", ""), torch.ones(2)), 2)]


@pytest.mark.parametrize("limit", [0.0, 0.3, 100.0])
def test_gradients_are_clipped_as_torch_clips_them(limit: float) -> None:
    line, other = Line(), Line()
    result = updater(line, PlainGradients([line.weight], CPU), limit=limit).step(0, shares())
    other.training_losses(shares()[0].batch).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_([other.weight], limit or math.inf)
    assert result.grad_norm == pytest.approx(norm.item())
    assert torch.allclose(line.weight, other.weight - 0.1 * other.weight.grad, rtol=1e-6, atol=0)


def test_weights_that_move_in_backward_are_left_to_it() -> None:
    line, plain = Line(), Line()
    result = updater(line, Fused(line.weight), limit=1e-3).step(0, shares())
    updater(plain, PlainGradients([plain.weight], CPU), limit=0.0).step(0, shares())
    assert result.updated and torch.equal(line.weight, plain.weight)


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_loss_is_checked_before_weights_can_move(on_nan: str, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("flow_scripts"), "propagate", True)
    line = Line()
    update, line.factor = updater(line, Fused(line.weight), on_nan=on_nan), math.nan
    if on_nan == "stop":
        with pytest.raises(NonFiniteError, match="the loss is nan.*before any weight is touched") as caught:
            update.step(0, shares())
        assert not isinstance(caught.value, PartlyUpdatedError)
    else:
        assert not update.step(0, shares()).updated
        assert "This step is left out" in caplog.text
    assert line.weight.tolist() == [0.5, -0.5]


def test_a_gradient_found_too_late_says_that_weights_have_moved() -> None:
    line = Line()
    update, line.slope = updater(line, Fused(line.weight)), math.inf
    with pytest.raises(PartlyUpdatedError, match="may already have moved: go on from the last state"):
        update.step(0, shares())


def test_skipping_goes_on_where_only_some_weights_have_moved(caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("flow_scripts"), "propagate", True)
    line = Line()
    update, line.slope = updater(line, Fused(line.weight), on_nan="skip"), math.inf
    assert update.step(0, shares()).updated
    assert "Gradients that are not finite are left out (--on_nan skip)." in caplog.text
    line.slope = 1.0
    assert update.step(1, shares()).updated and line.weight.tolist() != [0.5, -0.5]


@pytest.mark.parametrize("scaled", [False, True], ids=["bf16", "fp16"])
def test_a_step_in_which_everything_trained_was_left_out(scaled: bool) -> None:
    """As module dropout can do. It counts as a step, and what is trained stays as it is."""
    line = Line()
    optimizer = torch.optim.AdamW([line.weight], lr=0.1)
    settings = UpdateSettings(seed=1, max_grad_norm=1.0, scale_gradients=scaled)
    update = Updater(line, PlainGradients([line.weight], CPU), optimizer, Processes.start(), settings)
    for step, there in enumerate((True, False, True)):
        line.weight.requires_grad_(there)
        before = line.weight.detach().clone()
        result = update.step(step, shares())
        assert result.updated and (result.grad_norm > 0) == there
        assert torch.equal(line.weight, before) != there
