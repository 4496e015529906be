"""The running average of the network: its numbers, its swap with the network, its files."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from library.core.errors import CheckpointError, ConfigError
from library.options.ema import EmaOptions
from library.options.sampling import SampleOptions
from library.training.output.ema import Ema, decay_at


def walk(ema_options: EmaOptions, steps: int) -> tuple[Ema, nn.Linear, list[Tensor]]:
    """Move a layer's weights at random, averaging; return the weights after each step too."""
    torch.manual_seed(3)
    layer = nn.Linear(3, 2)
    ema, seen = Ema(layer.named_parameters(), ema_options), [layer.weight.detach().clone()]
    for step in range(1, steps + 1):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 3))
        ema.update(step)
        seen.append(layer.weight.detach().clone())
    return ema, layer, seen


def test_it_is_the_exponential_average_with_a_warm_up() -> None:
    ema, _, seen = walk(EmaOptions(ema=True, ema_decay=0.9), 200)
    expected = seen[0].double()
    for step, weight in enumerate(seen[1:], start=1):
        keep = min(0.9, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * weight.double()
    assert torch.allclose(ema.export_state()["weight"].double(), expected, atol=1e-5)


def test_warm_up_forgets_the_start_weights() -> None:
    assert decay_at(1, 0.999) == pytest.approx(2 / 11)
    assert decay_at(10_000_000, 0.999) == 0.999


def test_an_interval_keeps_the_speed_of_forgetting() -> None:
    """Weights that jump once and stay are approached alike, however often the average looks."""
    found = []
    for every in (1, 4):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(layer.weight)
        ema = Ema(layer.named_parameters(), EmaOptions(ema=True, ema_decay=0.95, ema_every_n_steps=every))
        nn.init.ones_(layer.weight)
        for step in range(1, 41):
            ema.update(step)
        found.append(ema.export_state()["weight"].item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert 0.9 < found[0] < 1.0


def test_between_intervals_it_does_not_move() -> None:
    ema, layer, _ = walk(EmaOptions(ema=True, ema_every_n_steps=5), 5)
    before = ema.export_state()["weight"].clone()
    nn.init.ones_(layer.weight)
    ema.update(6)
    assert torch.equal(before, ema.export_state()["weight"])


def test_in_place_the_parameters_are_the_average_and_come_back_bit_for_bit() -> None:
    ema, layer, seen = walk(EmaOptions(ema=True), 7)
    with pytest.raises(RuntimeError), ema.in_place():
        assert torch.equal(layer.weight, ema.export_state()["weight"])
        assert not torch.equal(layer.weight, seen[-1])
        raise RuntimeError
    assert torch.equal(layer.weight, seen[-1])
    assert layer.weight.requires_grad


def test_half_precision_parameters_are_averaged_in_fp32() -> None:
    """Steps far below bf16's resolution would be lost in a bf16 average."""
    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(layer.weight)
    ema = Ema(layer.named_parameters(), EmaOptions(ema=True, ema_decay=0.9999))
    nn.init.constant_(layer.weight, 1.5)
    for step in range(100_001, 100_011):
        ema.update(step)
    average = ema.export_state()["weight"]
    assert average.dtype == torch.float32
    assert average.item() == pytest.approx(1.5 - 0.5 * 0.9999**10, rel=1e-6)


def test_it_goes_on_from_a_state_as_if_nothing_had_happened() -> None:
    straight, _, seen = walk(EmaOptions(ema=True, ema_decay=0.9), 12)
    early, layer, _ = walk(EmaOptions(ema=True, ema_decay=0.9), 6)
    later = Ema(layer.named_parameters(), EmaOptions(ema=True, ema_decay=0.9))
    later.import_state(early.export_state())
    for step in range(7, 13):
        with torch.no_grad():
            layer.weight.copy_(seen[step])
        later.update(step)
    assert torch.equal(later.export_state()["weight"], straight.export_state()["weight"])


def test_a_state_of_another_network_is_refused() -> None:
    ema, _, _ = walk(EmaOptions(ema=True), 1)
    with pytest.raises(CheckpointError, match="another shape"):
        ema.import_state({"weight": torch.zeros(5, 3), "bias": torch.zeros(5)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema": True, "ema_decay": 1.0}, "--ema_decay is 1.0"),
        ({"ema": True, "ema_every_n_steps": 0}, "--ema_every_n_steps is 0"),
        ({"ema_decay": 0.9}, "--ema_decay is given without --ema"),
        ({"ema_sample": "both"}, "--ema_sample is given without --ema"),
    ],
)
def test_mistakes(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EmaOptions(**options)


def test_an_average_without_sample_pictures_to_draw() -> None:
    with pytest.raises(ConfigError, match="--ema_sample both has no sample pictures"):
        EmaOptions(ema=True, ema_sample="both").check_samples(SampleOptions())
    EmaOptions(ema=True).check_samples(SampleOptions())
