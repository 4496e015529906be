"""The training loss, number by number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from library.core.errors import ConfigError
from library.flow.loss import huber_threshold, sigma_weight, velocity_loss
from library.options.loss import LossOptions

SIGMA = torch.tensor([0.0, 0.25, 1.0])


def tensors(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 6, 5, generator=generator), torch.randn(3, 4, 6, 5, generator=generator)


def test_l2_and_l1_are_torchs() -> None:
    predicted, target = tensors()
    l2 = velocity_loss(predicted, target, SIGMA, LossOptions(loss_type="l2"))
    l1 = velocity_loss(predicted, target, SIGMA, LossOptions(loss_type="l1"))
    for i in range(3):
        assert l2[i].item() == pytest.approx(torch.nn.functional.mse_loss(predicted[i], target[i]).item())
        assert l1[i].item() == pytest.approx(torch.nn.functional.l1_loss(predicted[i], target[i]).item())


def test_huber_thresholds() -> None:
    c = 0.1
    constant = huber_threshold(
        SIGMA, LossOptions(loss_type="huber", huber_schedule="constant", huber_scale=2.0)
    )
    assert constant.tolist() == pytest.approx([0.2, 0.2, 0.2])
    exponential = huber_threshold(SIGMA, LossOptions(loss_type="huber", huber_schedule="exponential"))
    assert exponential.tolist() == pytest.approx([1.0, c**0.25, c])
    snr = huber_threshold(SIGMA, LossOptions(loss_type="huber"))  # the schedule by default works
    noise_to_signal = 0.25 / 0.75
    assert snr.tolist() == pytest.approx([1.0, (1 - c) / (1 + noise_to_signal) ** 2 + c, c])


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_pseudo_huber_formula_and_limits(loss_type: str, schedule: str) -> None:
    options = LossOptions(loss_type=loss_type, huber_schedule=schedule)
    predicted, target = tensors()
    threshold = huber_threshold(SIGMA, options)
    found = velocity_loss(predicted, target, SIGMA, options)
    for i, d in enumerate(threshold.tolist()):
        outer = 2 * d if loss_type == "huber" else 2
        elements = [
            outer * (math.sqrt(e * e + d * d) - d) for e in (predicted[i] - target[i]).flatten().tolist()
        ]
        assert found[i].item() == pytest.approx(sum(elements) / len(elements), rel=1e-5)
    far = velocity_loss(target + 1e4, target, SIGMA, options) / 1e4
    slope = 2 * threshold if loss_type == "huber" else torch.full((3,), 2.0)
    assert far.tolist() == pytest.approx(slope.tolist(), rel=1e-3)


def test_mask_multiplies_without_renormalising() -> None:
    predicted, target = tensors()
    mask = torch.zeros(3, 1, 6, 5)
    mask[:, :, :3] = 1  # half of the rows
    masked = velocity_loss(predicted, target, SIGMA, LossOptions(), mask)
    half = (predicted - target)[:, :, :3].square().mean(dim=(1, 2, 3)) / 2
    assert torch.allclose(masked, half)


def test_each_picture_has_its_weight() -> None:
    predicted, target = tensors()
    plain = velocity_loss(predicted, target, SIGMA, LossOptions())
    weighted = velocity_loss(predicted, target, SIGMA, LossOptions(), None, torch.tensor([0.0, 1.0, 2.5]))
    assert torch.allclose(weighted, plain * torch.tensor([0.0, 1.0, 2.5]))


def test_half_precision_predictions_are_compared_in_fp32() -> None:
    predicted, target = tensors()
    found = velocity_loss(predicted.bfloat16(), target, SIGMA, LossOptions())
    assert found.dtype == torch.float32
    assert torch.equal(found, velocity_loss(predicted.bfloat16().float(), target, SIGMA, LossOptions()))


def test_cosmap_has_mean_one_over_uniform_sigma_and_the_rest_is_one() -> None:
    sigma = (torch.arange(10_000) + 0.5) / 10_000
    assert sigma_weight("cosmap", sigma).mean().item() == pytest.approx(1, abs=1e-4)
    assert sigma_weight("cosmap", torch.tensor([0.5])).item() == pytest.approx(4 / math.pi)
    assert torch.equal(sigma_weight("uniform", sigma), torch.ones_like(sigma))


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "huber", "huber_c": 0.0},
        {"loss_type": "huber", "huber_scale": -1.0},
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        LossOptions(**settings)
