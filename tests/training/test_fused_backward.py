"""Weights that are stepped during backward come to the same as weights that are stepped after it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from library.models.nextdit import NextDiT
from library.nn.running.runner import MODES
from library.nn.swap.block_swap import BlockSwap
from library.options.optimizer import OptimizerOptions
from library.training.fused_backward import FusedBackward
from library.training.optim.one_by_one import OneByOne
from library.training.optim.optimizer import create_optimizer, set_learning_rates
from tests.models.lumina2_pairs import make_inputs, make_params
from tests.strict_copier import StrictCopier

CPU = torch.device("cpu")
ALONE = SimpleNamespace(world=1)
WIDTH = 24


class Small(nn.Module):
    """Linear layers in bf16, one of them used twice, one never; a gain in fp32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice, self.unused = (
            nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(3)
        )
        self.last = nn.Linear(WIDTH, 4 * WIDTH, dtype=torch.bfloat16)
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(self.first(x)))
        return self.last(self.twice(x * self.gain.to(x.dtype)))


def batch(step: int) -> Tensor:
    random = torch.Generator().manual_seed(50 + step)
    return torch.randn(6, WIDTH, generator=random, dtype=torch.float32).bfloat16()


def stepper(model: nn.Module, name: str = "AdamW", *, stochastic: bool = False) -> OneByOne:
    groups = [{"params": list(model.parameters()), "lr": 1e-3, "name": "dit"}]
    options = OptimizerOptions(optimizer_type=name, learning_rate=1e-3)
    inner = create_optimizer(groups, options, lean=False)
    return OneByOne(inner, model.named_parameters(), stochastic=stochastic, seed=1)


def exact_weights(model: nn.Module, optimizer: OneByOne) -> list[Tensor]:
    return [optimizer.exact(parameter).detach().clone() for parameter in model.parameters()]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def loss_of(model: nn.Module, step: int) -> Tensor:
    return model(batch(step)).float().square().mean()


def fused_step(gradients: FusedBackward, optimizer: OneByOne, step: int, loss: Tensor) -> float:
    """Make a step as `Updater` does; return the norm."""
    set_learning_rates(optimizer, lambda step, peaks: [peak / (step + 1) for peak in peaks], step)
    loss.backward()
    gradients.collect(ALONE)
    norm = gradients.norm().item()
    gradients.clear()
    return norm


def plain_step(model: nn.Module, optimizer: OneByOne, step: int, loss: Tensor, limit: float = 0.0) -> float:
    """Make a step after backward, with each gradient limited by itself; return the norm before that."""
    set_learning_rates(optimizer, lambda step, peaks: [peak / (step + 1) for peak in peaks], step)
    loss.backward()
    found = [p for p in model.parameters() if p.grad is not None]
    norm = sum(p.grad.double().square().sum() for p in found).sqrt().item()
    for parameter in found:
        if limit:
            nn.utils.clip_grad_norm_(parameter, limit)
    optimizer.step()
    optimizer.zero_grad()
    return norm


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "Lion", "SGDNesterov"])
def test_fused_is_what_a_step_after_backward_is(name: str, stochastic: bool) -> None:
    fused, plain = Small(), Small()
    ours, theirs = (stepper(model, name, stochastic=stochastic) for model in (fused, plain))
    gradients = FusedBackward(ours, CPU)
    for step in range(5):
        norm = fused_step(gradients, ours, step, loss_of(fused, step))
        assert norm == pytest.approx(plain_step(plain, theirs, step, loss_of(plain, step)), rel=1e-5)
    assert_same(exact_weights(fused, ours), exact_weights(plain, theirs))
    assert not torch.equal(fused.gain, Small().gain)
    assert_same([fused.unused.weight.data], [Small().unused.weight.data])


def test_each_gradient_is_limited_by_its_own_norm() -> None:
    fused, plain = Small(), Small()
    ours, theirs = stepper(fused, "SGD"), stepper(plain, "SGD")
    gradients = FusedBackward(ours, CPU, max_grad_norm=0.01)
    for step in range(3):
        norm = fused_step(gradients, ours, step, loss_of(fused, step))
        limited = plain_step(plain, theirs, step, loss_of(plain, step), limit=0.01)
        assert norm == pytest.approx(limited, rel=1e-3)  # that of before
        assert norm > 0.05
    for a, b in zip(exact_weights(fused, ours), exact_weights(plain, theirs), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-7)
    moved = fused.gain - Small().gain
    assert moved.norm() < 1e-3 * 0.01 * (1 + 1 / 2 + 1 / 3)


def test_one_gradient_is_alive_at_a_time() -> None:
    def alive_bytes(*, fused: bool) -> int:
        model = Small()
        made: list[tuple[StorageWeakRef, int]] = []
        most = 0

        def note(parameter: nn.Parameter) -> None:
            nonlocal most
            made.append((StorageWeakRef(parameter.grad.untyped_storage()), parameter.grad.nbytes))
            most = max(most, sum(size for storage, size in made if not storage.expired()))

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(note)
        if fused:
            FusedBackward(stepper(model), CPU)
        loss_of(model, 0).backward()
        assert len(made) == 7
        return most

    sizes = [parameter.nbytes for parameter in Small().parameters()]
    assert alive_bytes(fused=True) <= max(sizes)
    assert alive_bytes(fused=False) > 1.5 * max(sizes)


def test_a_gradient_that_is_not_finite_does_not_reach_its_weight() -> None:
    model = Small()
    optimizer = stepper(model)
    gradients = FusedBackward(optimizer, CPU, max_grad_norm=1.0)
    fused_step(gradients, optimizer, 0, loss_of(model, 0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    averages = optimizer.state[model.gain]["exp_avg"].clone()
    handle = model.gain.register_hook(lambda gradient: gradient * torch.nan)
    assert not fused_step(gradients, optimizer, 1, loss_of(model, 1)) < float("inf")
    assert torch.equal(model.gain, before["gain"])
    assert torch.equal(optimizer.state[model.gain]["exp_avg"], averages)
    assert not torch.equal(model.last.weight, before["last.weight"])
    handle.remove()
    assert fused_step(gradients, optimizer, 2, loss_of(model, 2)) < float("inf")
    assert not torch.equal(model.gain, before["gain"])


def test_a_step_without_a_picture_has_no_norm() -> None:
    optimizer = stepper(Small())
    gradients = FusedBackward(optimizer, CPU)
    gradients.collect(ALONE)
    assert gradients.norm().item() == 0
    gradients.clear()


def test_what_cannot_be_done_is_refused() -> None:
    model = Small()
    gradients = FusedBackward(stepper(model), CPU)
    assert gradients.moves_weights
    loss_of(model, 0).backward()
    with pytest.raises(AssertionError, match="second gradient"):
        loss_of(model, 0).backward()
    with pytest.raises(AssertionError, match="used during backward"):
        gradients.scale(0.5)
    with pytest.raises(AssertionError, match="other processes"):
        gradients.collect(SimpleNamespace(world=2))


def test_watching_ends() -> None:
    model = Small()
    gradients = FusedBackward(stepper(model), CPU)
    gradients.close()
    before = model.gain.detach().clone()
    loss_of(model, 0).backward()
    assert model.gain.grad is not None
    assert torch.equal(model.gain, before)


# --- models whose blocks compute again in backward, and whose weights come and go ---


def transformer(mode: str) -> NextDiT:
    torch.manual_seed(0)
    model = NextDiT(make_params())
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=weight.shape[1] ** -0.5) if weight.dim() == 2 else weight.normal_(1.0, 0.1)
    model.to(torch.bfloat16).t_embedder.float()
    model.runner.keep(mode)
    return model.requires_grad_(False)


def train_transformer(
    mode: str, *, fused: bool, ring_size: int = 0, beside: bool = False, stochastic: bool = False
) -> list[Tensor]:
    """Return losses and weights of three steps."""
    model = transformer(mode)
    if ring_size:
        blocks = model.runner.blocks[1:]
        model.runner.ring = BlockSwap(blocks, CPU, ring_size=ring_size, copier=StrictCopier())
    model.requires_grad_(True)
    optimizer = stepper(model, stochastic=stochastic)
    gradients = FusedBackward(optimizer, CPU, ring=model.runner.ring, beside=beside) if fused else None
    inputs, found = make_inputs(model.params, (9, 1), (8, 6)), []
    for step in range(3):
        loss = inputs.ours(model).float().square().mean()
        found.append(loss.detach())
        if gradients is None:
            plain_step(model, optimizer, step, loss)
        else:
            fused_step(gradients, optimizer, step, loss)
            assert all(parameter.grad is None for parameter in model.parameters())
    return [*found, *exact_weights(model, optimizer)]


@pytest.mark.parametrize("mode", MODES)
def test_in_every_way_of_running_blocks(mode: str) -> None:
    found = train_transformer(mode, fused=True)
    assert_same(found, train_transformer("none", fused=False))
    assert found[2] < found[0]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_swapped_blocks_are_stepped_at_home(mode: str, beside: bool) -> None:
    found = train_transformer(mode, fused=True, ring_size=2, beside=beside)
    assert_same(found, train_transformer("none", fused=False))


def test_rounding_at_random_does_not_hang_on_who_rounds() -> None:
    found = train_transformer("none", fused=True, ring_size=2, beside=True, stochastic=True)
    assert_same(found, train_transformer("none", fused=False, stochastic=True))


def test_a_swapped_gradient_that_is_not_finite_does_not_reach_its_weight() -> None:
    found = []
    for beside in (False, True):
        model = transformer("none")
        model.runner.ring = BlockSwap(model.runner.blocks, CPU, copier=StrictCopier())
        model.requires_grad_(True)
        optimizer = stepper(model)
        gradients = FusedBackward(optimizer, CPU, max_grad_norm=1.0, ring=model.runner.ring, beside=beside)
        weight = next(iter(model.runner.blocks[0].parameters()))
        weight.register_hook(lambda gradient: gradient * torch.nan)
        before = weight.detach().clone()
        loss = make_inputs(model.params, (9, 1), (8, 6)).ours(model).float().square().mean()
        assert not fused_step(gradients, optimizer, 0, loss) < float("inf")
        assert torch.equal(weight, before) and weight not in optimizer.state
        found.append(exact_weights(model, optimizer))
        gradients.close()
    assert_same(*found)
