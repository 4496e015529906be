"""Every optimizer of the table trains a LoRA, and its state can be taken out and put back bit for bit."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from library.core.errors import CheckpointError, ConfigError, MissingPackageError
from library.options.optimizer import OptimizerOptions
from library.options.optimizer_table import OPTIMIZERS, TORCH_OPTIMIZERS
from library.training.optim.optimizer import (
    Averaging,
    check_optimizer,
    create_optimizer,
    evaluating,
    export_state,
    import_state,
    learning_rates,
    set_learning_rates,
)

# What suits this problem where it is not 1e-2, or 1 for an optimizer that finds its rate.
RATES = {"Adadelta": 10.0, "Adagrad": 0.1, "SGDNesterov8bit": 5.0, "SGDNesterov": 5.0, "SGD": 20.0}
RATES |= {"ASGD": 20.0, "SGDScheduleFree": 30.0, "Rprop": 1e-3}
SETTINGS = {
    "Adafactor": ("scale_parameter=False",),  # else the matrix that starts at 0 grows slowly
    "RAdam": ("betas=(0.9,0.9)",),  # the sooner warm
    "RAdamScheduleFree": ("betas=(0.9,0.9)",),
    "DAdaptation": ("d0=1e-3", "growth_rate=1.02"),
    "DAdaptAdamPreprint": ("d0=1e-3", "growth_rate=1.02"),
    "DAdaptAdam": ("d0=1e-3", "growth_rate=1.02"),
    "DAdaptAdaGrad": ("d0=0.1",),
    "DAdaptSGD": ("d0=0.1", "growth_rate=1.1"),
}
CLASS_PATHS = (
    *("pytorch_optimizer.CAME", "pytorch_optimizer.ScheduleFreeAdamW", "bitsandbytes.optim.AdEMAMix8bit"),
)
NAMES = (*OPTIMIZERS, *TORCH_OPTIMIZERS, *CLASS_PATHS)
SIZE = 520  # times rank 8: more than the 4096 numbers below which bitsandbytes keeps 32-bit states
SCHEDULE_FREE = [name for name in OPTIMIZERS if name.endswith("ScheduleFree")]


class LowRank:
    """A LoRA of rank 8 on a matrix, and what it should become."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(8, SIZE, generator=random) / 8**0.5)
        self.up = nn.Parameter(torch.zeros(SIZE, 8))
        self.inputs = torch.randn(32, SIZE, generator=random) / SIZE**0.5
        self.wanted = torch.randn(32, SIZE, generator=random)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.down, self.up]

    def loss(self) -> torch.Tensor:
        return (self.inputs @ self.down.T @ self.up.T - self.wanted).square().mean()

    def train(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            self.loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def options_for(name: str, *args: str, **more: object) -> OptimizerOptions:
    usual = 1.0 if name in OPTIMIZERS and OPTIMIZERS[name].finds_its_rate else 1e-2
    more.setdefault("learning_rate", RATES.get(name, usual))
    return OptimizerOptions(optimizer_type=name, optimizer_args=args, **more)


def make(name: str, *args: str) -> tuple[LowRank, torch.optim.Optimizer]:
    lora, options = LowRank(), options_for(name, *(args or SETTINGS.get(name, ())))
    groups = [{"params": lora.parameters, "lr": options.learning_rate, "name": "lora"}]
    return lora, create_optimizer(groups, options)


def stored(
    tensors: dict[str, torch.Tensor], record: dict[str, object]
) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """What comes back from a safetensors and a strict JSON file."""
    return load(save(tensors)), json.loads(json.dumps(record, allow_nan=False))


@pytest.mark.parametrize("name", NAMES)
def test_trains(name: str) -> None:
    lora, optimizer = make(name)
    before = lora.loss().item()
    lora.train(optimizer, 40)
    with evaluating(optimizer):
        assert lora.loss().item() < 0.9 * before


@pytest.mark.parametrize("name", NAMES)
def test_goes_on_from_its_state_bit_for_bit(name: str) -> None:
    straight, optimizer = make(name)
    straight.train(optimizer, 12)
    first, optimizer = make(name)
    first.train(optimizer, 6)
    tensors, record = stored(*export_state(optimizer))
    second, fresh = make(name)
    half, optimizer = make(name)
    half.train(optimizer, 6)
    for parameter, weights in zip(second.parameters, half.parameters, strict=True):
        parameter.data.copy_(weights.data)
    import_state(fresh, tensors, record)
    second.train(fresh, 6)
    for ours, theirs in zip(second.parameters, straight.parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_settings_may_change_on_the_way_and_the_rest_stays() -> None:
    lora, optimizer = make("Prodigy", "weight_decay=0.1")
    lora.train(optimizer, 5)
    _, fresh = make("Prodigy", "weight_decay=0.2")
    import_state(fresh, *stored(*export_state(optimizer)))
    (old,), (new,) = optimizer.param_groups, fresh.param_groups
    assert (new["weight_decay"], new["d"], new["k"]) == (0.2, old["d"], 5)


def test_the_state_of_another_optimizer_is_refused() -> None:
    tensors, record = export_state(make("AdamW")[1])
    with pytest.raises(CheckpointError, match="The saved optimizer is torch.*AdamW, and.*Lion"):
        import_state(make("Lion")[1], tensors, record)
    single = create_optimizer([{"params": [LowRank().up], "lr": 1.0}], options_for("AdamW"))
    with pytest.raises(CheckpointError, match=r"groups of \[2\] parameters, and this run's has \[1\]"):
        import_state(single, tensors, record)


def test_fp32_state_of_bf16_weights_stays_fp32() -> None:
    weights = nn.Parameter(torch.randn(6, 5).bfloat16())
    optimizer, fresh = (
        create_optimizer([{"params": [weights], "lr": 1.0}], options_for("Adafactor")) for _ in range(2)
    )
    weights.grad = torch.randn(6, 5).bfloat16()
    optimizer.step()
    import_state(fresh, *stored(*export_state(optimizer)))
    before, after = optimizer.state[weights]["exp_avg_sq_row"], fresh.state[weights]["exp_avg_sq_row"]
    assert after.dtype == torch.float32
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_looking_at_the_average_changes_nothing(name: str) -> None:
    lora, optimizer = make(name)
    undisturbed, other = make(name)
    for trained in (lora, undisturbed):
        trained.train(optimizer if trained is lora else other, 9)
    training = [parameter.detach().clone() for parameter in lora.parameters]
    with evaluating(optimizer):
        assert not torch.equal(lora.up, training[1])
    assert all(torch.equal(p, before) for p, before in zip(lora.parameters, training, strict=True))
    lora.train(optimizer, 3)
    undisturbed.train(other, 3)
    assert torch.equal(lora.up, undisturbed.up)


def test_the_average_is_the_librarys() -> None:
    lora, optimizer = make("AdamWScheduleFree")
    lora.train(optimizer, 5)
    with evaluating(optimizer):
        ours = lora.up.detach().clone()
    optimizer.eval()
    assert torch.equal(lora.up, ours)


def test_only_schedule_free_optimizers_average() -> None:
    assert [name for name in OPTIMIZERS if isinstance(make(name)[1], Averaging)] == SCHEDULE_FREE
    lora, optimizer = make("AdamW")
    lora.train(optimizer, 1)
    before = lora.up.detach().clone()
    with evaluating(optimizer):
        assert torch.equal(lora.up, before)


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind.finds_its_rate])
def test_the_rate_that_was_found_is_logged(name: str) -> None:
    lora, optimizer = make(name)
    lora.train(optimizer, 3)
    (group,) = optimizer.param_groups
    set_learning_rates(optimizer, lambda step, peaks: [0.5 * peak for peak in peaks], step=3)
    assert learning_rates(optimizer) == {"lr/lora": 0.5, "lr/d*lr/lora": 0.5 * group["d"]}


@pytest.mark.parametrize("args", [(), ("warmup_init=True",), ("scale_parameter=False",)])
def test_the_rate_of_adafactors_relative_steps_is_logged(args: tuple[str, ...]) -> None:
    lora, optimizer = make("Adafactor", *args)
    assert learning_rates(optimizer) == {"lr/lora": 0.0}
    lora.train(optimizer, 4)
    group, state = optimizer.param_groups[0], optimizer.state[lora.down]
    assert learning_rates(optimizer) == {"lr/lora": pytest.approx(float(optimizer._get_lr(group, state)))}


def test_a_rate_of_ones_own_for_adafactor() -> None:
    lora, optimizer = make("Adafactor", "relative_step=False", "scale_parameter=False")
    set_learning_rates(optimizer, lambda step, peaks: [0.1 * peak for peak in peaks], step=0)
    lora.train(optimizer, 1)
    assert learning_rates(optimizer) == {"lr/lora": pytest.approx(1e-3)}
    assert lora.up.abs().max() > 0


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind.finds_its_rate])
def test_what_finds_one_rate_refuses_two(name: str) -> None:
    lora = LowRank()
    groups = [{"params": [lora.down], "lr": 1.0}, {"params": [lora.up], "lr": 4.0}]
    with pytest.raises(ConfigError, match=rf"{name} finds one rate .* several \(1, 4\). Leave out"):
        create_optimizer(groups, options_for(name))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = OPTIMIZERS[name].package
    monkeypatch.setitem(sys.modules, package, None)
    pip = package.replace("_", "-")
    with pytest.raises(MissingPackageError, match=f"--optimizer_type {name} needs .*pip install {pip}"):
        options_for(name)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("Lion", ["betaz=(0.9,0.99)"], "Lion has no setting 'betaz'; did you mean 'betas'"),
        ("AdamW8bit", ["wd=1"], "AdamW8bit has no setting 'wd'; there are lr, betas"),
        ("Prodigy", ["d0=-1"], "Prodigy does not take its settings: Invalid d0"),
        ("SGDNesterov", ["momentum=0"], "Nesterov momentum requires a momentum"),
        ("pytorch_optimizer.CAMEL", [], "pytorch_optimizer has no Optimizer of the name 'CAMEL'.*'CAME'"),
        ("torch.optim.adamvv.AdamW", [], "torch.optim.adamvv cannot be imported"),
        ("torch.optim.LBFGS", [], "LBFGS cannot train on cpu: .*closure"),
        ("pytorch_optimizer.SAM", [], "SAM cannot be made for these weights: .*base_optimizer"),
        ("torch.nn.Linear", [], "torch.nn has no Optimizer of the name 'Linear'"),
    ],
)
def test_mistakes_show_before_the_caches_are_filled(name: str, args: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_optimizer(options_for(name, *args), torch.device("cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_the_check_lets_good_settings_pass(name: str) -> None:
    check_optimizer(options_for(name, *SETTINGS.get(name, ())), torch.device("cpu"))


def test_the_table_has_torchs_optimizers_that_can_train_a_lora() -> None:
    listed = {*TORCH_OPTIMIZERS, "AdamW", "Adafactor"}
    others = {"Optimizer", "LBFGS", "SparseAdam"}
    assert listed | others == {name for name in dir(torch.optim) if name[0].isupper()}
