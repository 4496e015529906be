"""Whole models are trained weight by weight, exactly or rounded at random, and go on from states."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from library.core.errors import CheckpointError, ConfigError
from library.options.optimizer import OptimizerOptions
from library.options.optimizer_table import OPTIMIZERS, TORCH_OPTIMIZERS
from library.training.optim.one_by_one import OneByOne
from library.training.optim.optimizer import (
    create_optimizer,
    describe_optimizer,
    evaluating,
    export_state,
    import_state,
    learning_rates,
    set_learning_rates,
)
from library.training.optim.rounding import joined, round_randomly, split
from library.training.optim.trial import check_one_by_one

CPU = torch.device("cpu")
RECORD_OF_ALL = [name for name, kind in OPTIMIZERS.items() if kind.finds_its_rate]
AVERAGING = [name for name in OPTIMIZERS if name.endswith("ScheduleFree")]
# Those with 8-bit or paged states beyond one of each kind are the same code.
SKIPPED = {"PagedAdamW", "PagedAdamW8bit", "PagedLion8bit", "SGDNesterov8bit"}
NAMES = [n for n in OPTIMIZERS if n not in {*RECORD_OF_ALL, *AVERAGING, *SKIPPED}]
COUNTING = """
import torch

class Counting(torch.optim.Optimizer):
    '''SGD whose rate falls with the steps, which are counted in the group.'''

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] / group["step"] * p.grad)

class Forgetful(Counting):
    '''The same, but it counts where nobody can put the count back.'''

    def step(self):
        self.steps = getattr(self, "steps", 0) + 1
        for group in self.param_groups:
            group["step"] = self.steps
        super().step()

class ForGpus(Counting):
    def step(self):
        raise RuntimeError("there is no kernel for the CPU")
"""


@pytest.fixture
def own_optimizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_optimizers.py").write_text(COUNTING, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


class Model(nn.Module):
    """Weights of several sizes, one of them fp32 always, as a time embedder is."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        shapes = {"wide": (70, 64), "square": (32, 32), "bias": (17,), "clock": (8, 8)}
        for name, shape in shapes.items():
            kept = torch.float32 if name == "clock" else dtype
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=random).bfloat16().to(kept)))

    def give_gradients(self, step: int) -> None:
        """Give each weight the gradient of a step, which any dtype can tell."""
        random = torch.Generator().manual_seed(100 + step)
        for parameter in self.parameters():
            gradient = (0.1 * torch.randn(parameter.shape, generator=random)).bfloat16()
            parameter.grad = gradient.to(parameter.dtype)


def options_for(name: str, rate: float = 1e-3) -> OptimizerOptions:
    return OptimizerOptions(optimizer_type=name, learning_rate=rate)


def inner_of(model: nn.Module, name: str, rate: float = 1e-3) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups = [{"params": parameters[:2], "lr": rate, "name": "dit"}]
    groups.append({"params": parameters[2:], "lr": 2 * rate, "name": "rest"})
    return create_optimizer(groups, options_for(name, rate), lean=False)


def stepper(model: nn.Module, name: str, *, stochastic: bool = False, seed: int = 3) -> OneByOne:
    return OneByOne(inner_of(model, name), model.named_parameters(), stochastic=stochastic, seed=seed)


def halving(step: int, peaks: Sequence[float]) -> list[float]:
    return [peak / (1 + step) for peak in peaks]


def train(model: Model, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_learning_rates(optimizer, halving, step)
        model.give_gradients(step)
        optimizer.step()
        optimizer.zero_grad()


def same(a: Tensor, b: Tensor) -> bool:
    """Whether all bits are the same."""
    return a.dtype == b.dtype and torch.equal(a, b)


# --- rounding ---


def all_kinds_of_numbers() -> Tensor:
    """fp32 numbers with every upper half there is: each exponent and sign, denormal, infinite and NaN."""
    uppers = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    random = torch.randint(2**16, (2**16, 2), generator=torch.Generator().manual_seed(0))
    fixed = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]).expand(2**16, -1)
    bits = uppers + torch.cat([fixed, random], dim=1)
    return bits.where(bits < 2**31, bits - 2**32).to(torch.int32).view(torch.float32)


def test_every_number_comes_back_bit_for_bit() -> None:
    numbers = all_kinds_of_numbers()
    weight, remainder = numbers.bfloat16(), torch.zeros(numbers.shape, dtype=torch.int16)
    split(numbers.clone(), weight, remainder)
    back = joined(weight, remainder)
    unlike = back.view(torch.int32) != numbers.view(torch.int32)
    assert torch.equal(unlike & numbers.isnan(), unlike)
    assert torch.equal(back.isnan(), numbers.isnan())
    assert torch.equal(weight.isnan(), numbers.isnan())


def test_the_weight_is_the_nearest_and_ties_go_away_from_zero() -> None:
    numbers = all_kinds_of_numbers()
    numbers = numbers[numbers.isfinite()]
    weight, remainder = torch.empty_like(numbers, dtype=torch.bfloat16), numbers.to(torch.int16)
    split(numbers.clone(), weight, remainder)
    bits, ours, torchs = (t.view(torch.int16) for t in (numbers, weight, numbers.bfloat16()))
    ties = bits[::2] == -(2**15)
    assert torch.equal(ours[~ties], torchs[~ties])
    assert torch.equal(ours[ties], bits[1::2][ties] + 1)


def test_random_rounding_is_right_on_average() -> None:
    exact = torch.tensor([1.0, 1.0 + 2**-9, 1.0 + 2**-8, -3.0 - 2**-9, 1e-3, -7e20, 1e-40]).repeat(20000, 1)
    rounded = torch.empty_like(exact, dtype=torch.bfloat16)
    round_randomly(exact.clone(), rounded, torch.Generator().manual_seed(5))
    spacing = (exact[0].abs().view(torch.int32).bitwise_and(-(2**16)) + 2**16).view(torch.float32)
    spacing = spacing - exact[0].abs().view(torch.int32).bitwise_and(-(2**16)).view(torch.float32)
    errors = ((rounded.double() - exact.double()) / spacing).mean(dim=0).abs()
    assert (errors < 5 * 0.5 / 20000**0.5).all()
    assert ((rounded.double() - exact.double()).abs() < spacing).all()
    assert len(rounded[:, 1].unique()) == 2


def test_what_bf16_can_tell_is_never_rounded() -> None:
    numbers = all_kinds_of_numbers()[:, 0]
    rounded = torch.empty_like(numbers, dtype=torch.bfloat16)
    round_randomly(numbers.clone(), rounded, torch.Generator().manual_seed(5))
    known = ~numbers.isnan()
    assert same(rounded[known].float(), numbers[known])


def test_nan_stays_nan_in_random_rounding() -> None:
    numbers = all_kinds_of_numbers()
    rounded = torch.empty_like(numbers, dtype=torch.bfloat16)
    round_randomly(numbers.clone(), rounded, torch.Generator().manual_seed(5))
    assert torch.equal(rounded.isnan(), numbers.isnan())


# --- steps ---


@pytest.mark.parametrize("name", [*NAMES, "pytorch_optimizer.CAME", "RMSprop", "NAdam", "Adagrad"])
def test_bf16_weights_are_trained_exactly_as_fp32_ones(name: str) -> None:
    halves, whole = Model(torch.bfloat16), Model(torch.float32)
    optimizer, plain = stepper(halves, name), inner_of(whole, name)
    train(halves, optimizer, range(50))
    train(whole, plain, range(50))
    for ours, theirs in zip(halves.parameters(), whole.parameters(), strict=True):
        assert same(optimizer.exact(ours), theirs.data)
    assert not torch.equal(optimizer.exact(halves.wide), halves.wide.float())  # there is something to lose
    assert not torch.equal(halves.wide, Model(torch.bfloat16).wide)


def test_a_step_too_small_for_bf16_is_not_lost() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    inner = create_optimizer([{"params": [weight], "lr": 1e-4}], options_for("SGD", 1e-4), lean=False)
    optimizer = OneByOne(inner, [("w", weight)])
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert optimizer.exact(weight).tolist() == pytest.approx([0.99] * 4, rel=1e-5)


def test_random_rounding_follows_the_fp32_run_on_average() -> None:
    weight = nn.Parameter(torch.ones(10000, dtype=torch.bfloat16))
    inner = create_optimizer([{"params": [weight], "lr": 1e-4}], options_for("SGD", 1e-4), lean=False)
    optimizer = OneByOne(inner, [("w", weight)], stochastic=True)
    for step in range(100):
        optimizer.begin(step)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(0.99, abs=2e-4)
    assert optimizer.export_state() == {}


def test_noise_is_a_function_of_seed_step_and_name() -> None:
    def rounded(name: str, seed: int, step: int) -> Tensor:
        weight = nn.Parameter(torch.ones(300, dtype=torch.bfloat16))
        inner = create_optimizer([{"params": [weight], "lr": 1e-3}], options_for("SGD"), lean=False)
        optimizer = OneByOne(inner, [(name, weight)], stochastic=True, seed=seed)
        optimizer.begin(step)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        return weight.data

    first = rounded("a", 1, 7)
    assert torch.equal(first, rounded("a", 1, 7))
    for other in (("b", 1, 7), ("a", 2, 7), ("a", 1, 8)):
        assert not torch.equal(first, rounded(*other))


def test_random_rounding_must_know_the_step() -> None:
    model = Model(torch.bfloat16)
    optimizer = stepper(model, "SGD", stochastic=True)
    train(model, optimizer, range(1))
    model.give_gradients(1)
    with pytest.raises(AssertionError, match="which step"):
        optimizer.step()


def test_the_optimizer_inside_sees_one_weight_in_fp32() -> None:
    model, seen = Model(torch.bfloat16), []

    class Looking(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            ((weight,),) = [group["params"] for group in self.param_groups]
            assert weight.grad.dtype == weight.dtype == torch.float32
            seen.append((weight.shape, self.param_groups[0]["lr"]))
            super().step()

    groups = [
        {"params": [parameter], "initial_lr": n + 1.0} for n, parameter in enumerate(model.parameters())
    ]
    optimizer = OneByOne(Looking(groups, lr=1.0), model.named_parameters())
    train(model, optimizer, range(1))
    assert seen == [(parameter.shape, n + 1.0) for n, parameter in enumerate(model.parameters())]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1] * len(groups)


class Counting(torch.optim.Optimizer):
    """Counts steps in its groups, and remembers them of each weight; it takes its time."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"count": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["count"] += 1
            time.sleep(0.001)
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                parameter.add_(parameter.grad, alpha=1.0 / group["count"] / state["count"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_threads_step_weights_at_the_same_time(dtype: torch.dtype) -> None:
    results = []
    for threads in (1, 2):
        random = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.ones(64, dtype=dtype)) for _ in range(12)]
        optimizer = OneByOne(Counting(weights), [(str(n), weight) for n, weight in enumerate(weights)])
        with ThreadPoolExecutor(threads) as pool:
            for number in range(3):
                optimizer.begin(number)
                gradients = [torch.randn(64, generator=random).to(dtype) for _ in weights]
                list(pool.map(optimizer.step_of, weights, gradients))
                optimizer.finish()
        assert [group["count"] for group in optimizer.param_groups] == [3]
        assert [optimizer.state[weight]["count"] for weight in weights] == [3] * 12
        results.append([optimizer.exact(weight).detach().clone() for weight in weights])
    assert all(same(one, two) for one, two in zip(*results, strict=True))


def test_a_step_that_fails_leaves_its_weight_and_the_groups() -> None:
    model = Model(torch.bfloat16)

    class Failing(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            super().step()
            raise MemoryError

    optimizer = OneByOne(Failing(model.parameters(), lr=1.0), model.named_parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.give_gradients(0)
    with pytest.raises(MemoryError):
        optimizer.step_of(model.wide)
    assert torch.equal(model.wide, before[0]) and model.wide.dtype == torch.bfloat16
    assert len(optimizer.param_groups[0]["params"]) == len(before)


def test_gradients_and_memory_are_where_they_were() -> None:
    model = Model(torch.bfloat16)
    optimizer = stepper(model, "AdamW")
    model.give_gradients(0)
    places = [(p.data_ptr(), p.grad.data_ptr(), p.dtype) for p in model.parameters()]
    optimizer.step()
    assert places == [(p.data_ptr(), p.grad.data_ptr(), p.grad.dtype) for p in model.parameters()]
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_weight_without_gradient_is_left_alone() -> None:
    model = Model(torch.bfloat16)
    optimizer, before = stepper(model, "AdamW"), model.square.detach().clone()
    model.give_gradients(0)
    model.square.grad = None
    optimizer.step()
    assert torch.equal(model.square, before)
    assert model.square not in optimizer.state
    assert model.wide in optimizer.state


def test_steps_counted_in_groups_count_once_a_step(own_optimizers: None) -> None:
    halves, whole = Model(torch.bfloat16), Model(torch.float32)
    optimizer, plain = (
        stepper(halves, "own_optimizers.Counting"),
        inner_of(whole, "own_optimizers.Counting"),
    )
    train(halves, optimizer, range(5))
    train(whole, plain, range(5))
    assert [group["step"] for group in optimizer.param_groups] == [5, 5]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    assert all(
        same(optimizer.exact(a), b.data) for a, b in zip(halves.parameters(), whole.parameters(), strict=True)
    )


# --- states ---


def stored(tensors: dict[str, Tensor], record: object) -> tuple[dict[str, Tensor], dict[str, object]]:
    """What comes back from a safetensors and a strict JSON file."""
    return load(save(tensors)), json.loads(json.dumps(record, allow_nan=False))


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_goes_on_from_its_state_bit_for_bit(name: str, stochastic: bool) -> None:
    straight, first, second = (Model(torch.bfloat16) for _ in range(3))
    train(straight, stepper(straight, name, stochastic=stochastic), range(9))
    half = stepper(first, name, stochastic=stochastic)
    train(first, half, range(5))
    weights, remainders = load(save(first.state_dict())), load(save(half.export_state()))
    state = stored(*export_state(half))
    train(first, half, range(5, 7))
    second.load_state_dict(weights)
    fresh = stepper(second, name, stochastic=stochastic)
    import_state(fresh, *state)
    fresh.import_state(remainders)
    train(second, fresh, range(5, 9))
    for ours, theirs in zip(second.parameters(), straight.parameters(), strict=True):
        assert same(ours.data, theirs.data)


def test_what_is_loaded_stays_fp32_and_is_not_copied() -> None:
    model, again = Model(torch.bfloat16), Model(torch.bfloat16)
    optimizer, fresh = stepper(model, "AdamW"), stepper(again, "AdamW")
    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    places = [(p.data_ptr(), p.dtype, p.is_contiguous()) for p in again.parameters()]
    fresh.load_state_dict(state)
    assert fresh.state[again.wide]["exp_avg"].data_ptr() == state["state"][0]["exp_avg"].data_ptr()
    assert places == [(p.data_ptr(), p.dtype, p.is_contiguous()) for p in again.parameters()]


def test_exporting_copies_nothing() -> None:
    model = Model(torch.bfloat16)
    optimizer = stepper(model, "AdamW")
    train(model, optimizer, range(1))
    tensors, _ = export_state(optimizer)
    assert tensors["state.0.exp_avg"].data_ptr() == optimizer.state[model.wide]["exp_avg"].data_ptr()
    remainders = optimizer.export_state()
    assert {name: t.dtype for name, t in remainders.items()} == dict.fromkeys(
        ("wide", "square", "bias"), torch.int16
    )
    assert remainders["wide"].data_ptr() == optimizer.export_state()["wide"].data_ptr()


def test_remainders_of_other_weights_are_refused() -> None:
    optimizer = stepper(Model(torch.bfloat16), "AdamW")
    remainders = optimizer.export_state()
    with pytest.raises(CheckpointError, match=r"other weights \(bias, square, wide\).*--full_bf16"):
        optimizer.import_state({})
    with pytest.raises(CheckpointError, match=r"other weights \(square\)"):
        optimizer.import_state(remainders | {"square": torch.zeros(3, dtype=torch.int16)})
    stepper(Model(torch.float32), "AdamW").import_state({})


# --- looking like an optimizer ---


def test_it_says_what_the_optimizer_inside_says() -> None:
    model = Model(torch.bfloat16)
    optimizer = stepper(model, "AdamW")
    train(model, optimizer, range(2))
    assert learning_rates(optimizer) == {"lr/dit": 0.5e-3, "lr/rest": 1e-3}
    assert describe_optimizer(optimizer, options_for("AdamW")) == "torch.optim.adamw.AdamW"
    before = model.wide.detach().clone()
    with evaluating(optimizer):
        assert torch.equal(model.wide, before)


def test_the_rate_that_adafactor_finds() -> None:
    model = Model(torch.bfloat16)
    optimizer = stepper(model, "Adafactor")
    train(model, optimizer, range(2))
    assert learning_rates(optimizer).keys() == {"lr/dit", "lr/rest"}
    assert learning_rates(optimizer)["lr/dit"] > 0


def test_adamw_is_fused_and_not_the_one_for_thin_matrices() -> None:
    inner = inner_of(Model(torch.bfloat16), "AdamW")
    assert type(inner) is torch.optim.AdamW
    assert inner.defaults["fused"] is True


# --- what can be stepped so ---


@pytest.mark.parametrize(
    "name", [*NAMES, *sorted(SKIPPED), *TORCH_OPTIMIZERS, "pytorch_optimizer.CAME", "own_optimizers.Counting"]
)
def test_the_check_lets_pass_what_treats_weights_by_themselves(name: str, own_optimizers: None) -> None:
    for rate in (2e-6, 1e-2):
        check_one_by_one(options_for(name, rate), CPU)


@pytest.mark.parametrize("rate", [2e-6, 1.0])
@pytest.mark.parametrize("name", [*RECORD_OF_ALL, "pytorch_optimizer.Prodigy", "own_optimizers.Forgetful"])
def test_one_record_for_all_weights_is_refused(name: str, rate: float, own_optimizers: None) -> None:
    with pytest.raises(ConfigError, match=f"{name} keeps one record for all .* Use AdamW, .* Adafactor or"):
        check_one_by_one(options_for(name, rate), CPU)


@pytest.mark.parametrize("name", [*AVERAGING, "pytorch_optimizer.ScheduleFreeAdamW"])
def test_averaging_optimizers_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} trains one set of weights and means another.*Use AdamW"):
        check_one_by_one(options_for(name), CPU)


def test_a_device_where_it_cannot_step_is_told(own_optimizers: None) -> None:
    with pytest.raises(ConfigError, match="lie on cpu: there is no kernel for"):
        check_one_by_one(options_for("own_optimizers.ForGpus"), CPU)
