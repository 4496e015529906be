"""Learning-rate curves against transformers' schedulers of the same names."""

from __future__ import annotations

import pytest
import torch
from diffusers.optimization import get_piecewise_constant_schedule
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from library.core.errors import ConfigError
from library.options.optimizer import SCHEDULERS, OptimizerOptions
from library.training.optim.lr import learning_rate_schedule, lr_multiplier

FOLLOW_THE_LOSS = {"reduce_lr_on_plateau", "greedy"}


def theirs(name: str, lr: float, warmup: int, total: int, **settings: object) -> list[float]:
    """transformers' factors for each step of a run and some more."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = get_scheduler(name, optimizer, warmup, total, settings)
    factors = []
    for _ in range(total + 5):
        factors.append(scheduler.get_last_lr()[0] / lr)
        optimizer.step()
        scheduler.step()
    return factors


def ours(total: int, **options: object) -> list[float]:
    multiplier = lr_multiplier(OptimizerOptions(**options), total)
    return [multiplier(step) for step in range(total + 5)]


def test_every_scheduler_of_transformers_that_is_a_function_of_the_step_is_there() -> None:
    others = {"piecewise_constant", "adafactor"}
    assert set(SCHEDULERS) - others == {kind.value for kind in SchedulerType} - FOLLOW_THE_LOSS


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(
    ("name", "options", "settings_"),
    [
        ("constant_with_warmup", {}, {}),
        ("linear", {}, {}),
        ("cosine", {}, {}),
        ("cosine_with_restarts", {}, {}),
        ("cosine_with_restarts", {"lr_scheduler_num_cycles": 3}, {"num_cycles": 3}),
        ("polynomial", {}, {}),
        ("polynomial", {"lr_scheduler_power": 2.5}, {"power": 2.5}),
        ("inverse_sqrt", {}, {}),
        ("inverse_sqrt", {"lr_scheduler_timescale": 50}, {"timescale": 50}),
        ("cosine_with_min_lr", {"lr_scheduler_min_lr_ratio": 0.1}, {"min_lr_rate": 0.1}),
        (
            "cosine_with_min_lr",
            {"lr_scheduler_min_lr_ratio": 0.1, "lr_scheduler_num_cycles": 3},
            {"min_lr_rate": 0.1, "num_cycles": 1.5},
        ),
        ("cosine_warmup_with_min_lr", {"lr_scheduler_min_lr_ratio": 0.2}, {"min_lr_rate": 0.2}),
        ("warmup_stable_decay", {"lr_decay_steps": 9}, {"num_decay_steps": 9}),
        (
            "warmup_stable_decay",
            {"lr_decay_steps": 9, "lr_scheduler_min_lr_ratio": 0.1, "lr_scheduler_num_cycles": 3},
            {"num_decay_steps": 9, "min_lr_ratio": 0.1, "num_cycles": 1.5},
        ),
    ],
)
def test_equals_transformers(name: str, options: dict, settings_: dict, warmup: int) -> None:
    expected = theirs(name, 3e-4, warmup, 40, **settings_)
    actual = ours(40, lr_scheduler=name, learning_rate=3e-4, lr_warmup_steps=warmup, **options)
    assert actual == pytest.approx(expected, abs=1e-12)


def test_piecewise_constant_equals_diffusers() -> None:
    rules = "1:3,0.1:7,0.01"
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_piecewise_constant_schedule(optimizer, rules)
    expected = []
    for _ in range(12):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    options = OptimizerOptions(lr_scheduler="piecewise_constant", lr_scheduler_args=(f"step_rules={rules}",))
    schedule = learning_rate_schedule(options, 10)
    assert [schedule(step, [1.0, 2.0]) for step in range(12)] == [[f, 2 * f] for f in expected]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("StepLR", ["step_size=3", "gamma=0.5"]),
        ("StepLR", ["step_size=3", "last_epoch=-1"]),
        ("CosineAnnealingLR", ["T_max=8", "eta_min=1e-5"]),
        ("CosineAnnealingWarmRestarts", ["T_0=4"]),
        ("torch.optim.lr_scheduler.OneCycleLR", ["max_lr=1e-2", "total_steps=12", "cycle_momentum=False"]),
    ],
)
def test_a_class_gives_the_rates_that_it_gives_an_optimizer(kind: str, words: list[str]) -> None:
    options = OptimizerOptions(lr_scheduler_type=kind, lr_scheduler_args=tuple(words))
    peaks = [1e-3, 4e-3]
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": peak} for peak in peaks]
    optimizer = torch.optim.AdamW(groups)
    settings_ = options.scheduler_settings()
    scheduler = vars(torch.optim.lr_scheduler)[kind.rpartition(".")[2]](optimizer, **settings_)
    expected = []
    for _ in range(11):
        expected.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    straight = learning_rate_schedule(options, 11)
    assert [list(straight(step, peaks)) for step in range(11)] == expected
    resumed = learning_rate_schedule(options, 11)
    assert [list(resumed(step, peaks)) for step in range(6, 11)] == expected[6:]


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("ReduceLROnPlateau", [], "follows the loss"),
        ("StepLR", ["stepsize=3"], "StepLR has no setting 'stepsize'; did you mean 'step_size'"),
        ("StepLR", [], "StepLR does not take its --lr_scheduler_args: .*step_size"),
        ("OneCycleLR", ["max_lr=1.0", "total_steps=12"], "give cycle_momentum=False"),
        ("StepLRR", [], "no LRScheduler of the name 'StepLRR'; did you mean 'StepLR'"),
        ("torch.nn.Linear", [], "no LRScheduler of the name 'Linear'"),
    ],
)
def test_mistakes_with_a_class_are_named(kind: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        learning_rate_schedule(OptimizerOptions(lr_scheduler_type=kind, lr_scheduler_args=tuple(words)), 10)


def test_a_class_that_ends_before_the_run_says_so() -> None:
    words = ("max_lr=1.0", "total_steps=3", "cycle_momentum=False")
    schedule = learning_rate_schedule(
        OptimizerOptions(lr_scheduler_type="OneCycleLR", lr_scheduler_args=words), 10
    )
    with pytest.raises(ConfigError, match="OneCycleLR does not take .*Tried to step 4 times"):
        schedule(9, [1.0])


def test_constant_is_constant() -> None:
    assert ours(10) == theirs("constant", 1e-4, 0, 10) == [1.0] * 15


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["linear", "cosine", "polynomial", "cosine_with_restarts"]),
    total=st.integers(1, 30),
    share=st.floats(0, 1),
)
def test_equals_transformers_for_any_length(name: str, total: int, share: float) -> None:
    warmup = int(share * (total - 1))
    expected = theirs(name, 1e-3, warmup, total)
    actual = ours(total, lr_scheduler=name, learning_rate=1e-3, lr_warmup_steps=warmup)
    assert actual[:total] == pytest.approx(expected[:total], abs=1e-12)


def test_warmup_may_be_a_share_of_the_run() -> None:
    kind = {"lr_scheduler": "linear"}
    assert ours(200, lr_warmup_steps=0.05, **kind) == ours(200, lr_warmup_steps=10, **kind)


def test_warmup_longer_than_the_run_is_an_error() -> None:
    with pytest.raises(ConfigError, match="50 steps.*longer than the run of 40"):
        ours(40, lr_scheduler="linear", lr_warmup_steps=50)
    with pytest.raises(ConfigError, match="longer than the run"):
        ours(40, lr_scheduler="warmup_stable_decay", lr_warmup_steps=30, lr_decay_steps=20)
