"""What is drawn for scheduled sampling, and what ReflexFlow does to a loss."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.core.errors import ConfigError
from library.flow import rollout
from library.flow.loss import velocity_loss
from library.options.loss import LossOptions
from library.options.rollout import RolloutOptions


def options(**given: object) -> RolloutOptions:
    return RolloutOptions(**{f"scheduled_sampling_{name}": value for name, value in given.items()})


SHARE = st.floats(0, 1)


# --- the share of pictures ---


@given(SHARE, SHARE, st.integers(1, 300), st.integers(0, 200), st.sampled_from(["linear", "cosine"]))
def test_a_ramp_goes_from_start_to_end(start, end, steps, begin, shape) -> None:
    """Also from 0 and to 0, and never beyond; --scheduled_sampling_probability has no say."""
    made = options(
        probability=0.9, prob_start=start, prob_end=end, ramp_steps=steps, start_step=begin, ramp_shape=shape
    )
    shares = [rollout.probability(made, step) for step in range(begin + steps + 3)]
    assert shares[: begin + 1] == [start] * (begin + 1)
    assert shares[begin + steps :] == [end] * 3
    middle = rollout.probability(made, begin + steps / 2)
    assert middle == pytest.approx((start + end) / 2)
    rising = shares if end >= start else shares[::-1]
    assert all(one <= other + 1e-12 for one, other in zip(rising, rising[1:], strict=False))
    quarter = rollout.probability(made, begin + steps / 4)
    part = 0.25 if shape == "linear" else (1 - math.cos(math.pi / 4)) / 2
    assert quarter == pytest.approx(start + part * (end - start))


@given(SHARE, st.integers(0, 20))
def test_without_a_ramp_the_share_is_the_same_from_its_first_step_on(share, begin) -> None:
    made = options(probability=share, start_step=begin, prob_end=0.7)
    assert [rollout.probability(made, step) for step in range(25)] == [0.0] * begin + [share] * (25 - begin)


# --- the number of steps ---


@pytest.mark.parametrize(
    ("strategy", "most_likely", "mean"),
    [("uniform", None, 2.0), ("biased_early", 0, 4 / 3), ("biased_late", 4, 8 / 3)],
)
def test_offsets(strategy: str, most_likely: int | None, mean: float) -> None:
    made = options(max_step_offset=4, probability=1.0, strategy=strategy)
    drawn = Counter(rollout.draw_offset(made, 1, step, 0, slot) for step in range(500) for slot in range(8))
    assert set(drawn) == set(range(5))
    assert sum(n * count for n, count in drawn.items()) / 4000 == pytest.approx(mean, abs=0.1)
    if most_likely is None:
        assert max(drawn.values()) < 1.2 * min(drawn.values())
    else:
        assert drawn.most_common(1)[0][0] == most_likely


def test_the_share_of_pictures_is_the_probability_of_their_step() -> None:
    made = options(max_step_offset=1, strategy="biased_late", prob_end=0.8, ramp_steps=4)
    for step, share in enumerate([0.0, 0.2, 0.4, 0.6, 0.8]):
        drawn = [rollout.draw_offset(made, 3, step, 0, slot) for slot in range(3000)]
        assert sum(drawn) / 3000 == pytest.approx(
            share * math.sqrt(0.5), abs=0.03
        )  # round(1 - u^2) is 1 up to there


def test_a_draw_is_a_function_of_its_key() -> None:
    made = options(max_step_offset=9, probability=0.5)
    keys = [
        (seed, step, micro, slot)
        for seed in (1, 2)
        for step in (0, 1)
        for micro in (0, 1)
        for slot in range(40)
    ]
    drawn = [rollout.draw_offset(made, *key) for key in keys]
    assert drawn == [rollout.draw_offset(made, *key) for key in keys]
    parts = [tuple(drawn[at : at + 40]) for at in range(0, len(drawn), 40)]
    assert len(set(parts)) == 8


# --- the walk ---


@given(st.floats(0, 1, width=32), st.integers(0, 50), st.sampled_from([0.001, 0.02, 0.04, 0.3, 1.0]))
def test_a_walk_ends_at_sigma_and_stays_on_the_path(sigma, offset, size) -> None:
    walk = rollout.walk(sigma, offset, size)
    source = min(sigma + offset * size, 1.0)
    if not walk:
        assert source - sigma <= 1e-5 * size
        return
    assert walk[-1] == sigma and walk[0] == source and len(walk) - 1 <= offset
    steps = [one - other for one, other in zip(walk, walk[1:], strict=False)]
    assert steps == pytest.approx([(source - sigma) / len(steps)] * len(steps), abs=1e-9)
    assert steps[0] <= size * 1.00001
    if source < 1:
        assert len(steps) == offset
    else:
        assert len(steps) == math.ceil((1 - sigma) / size - 1e-6), "no more than are needed"


# --- the loss ---


def test_weights_rise_with_the_size_of_the_bias_and_have_their_mean() -> None:
    clean, biased = torch.randn(2, 16, 6, 4, generator=torch.Generator().manual_seed(1))
    for alpha in (0.0, 1.0, 2.5):
        weights = rollout.emphasis(clean, biased, alpha)
        assert weights.mean().item() == pytest.approx(1 + alpha, rel=1e-5)
        assert weights.min() >= 1
        torch.testing.assert_close(weights, rollout.emphasis(-clean, -biased, alpha))
    order = weights.flatten().argsort()
    assert ((clean - biased).abs().flatten()[order].diff() >= 0).all()
    assert (rollout.emphasis(clean, clean, 1.0) == 1).all()


def test_a_perfect_prediction_on_the_path_has_no_drift() -> None:
    """The sign: on the path, away from the picture is where the velocity points."""
    x0, noise = torch.randn(2, 16, 6, 4, generator=torch.Generator().manual_seed(1))
    sigma = 0.3
    x = (1 - sigma) * x0 + sigma * noise
    velocity = noise - x0
    assert rollout.anti_drift(velocity, x - x0, None).item() == pytest.approx(0, abs=1e-10)
    assert rollout.anti_drift(-velocity, x - x0, None).item() == pytest.approx(4, rel=1e-5)
    other = torch.randn(16, 6, 4, generator=torch.Generator().manual_seed(2))
    cosine = torch.cosine_similarity(velocity.flatten(), other.flatten(), dim=0).item()
    assert rollout.anti_drift(velocity, other, None).item() == pytest.approx(2 - 2 * cosine, rel=1e-5)


def test_a_step_along_it_leads_back_to_the_picture() -> None:
    """Whoever walked astray and is told the direction of the anti-drift term arrives at the picture."""
    x0, noise, astray = torch.randn(3, 4, 6, 4, generator=torch.Generator().manual_seed(1))
    x = 0.7 * x0 + 0.3 * noise + 0.2 * astray
    predicted = torch.nn.Parameter(noise - x0)
    rollout.anti_drift(predicted, x - x0, None).backward()
    before = torch.cosine_similarity((x - x0).flatten(), predicted.flatten(), dim=0)
    moved = predicted - 0.1 * predicted.grad / predicted.grad.norm() * predicted.norm()
    assert torch.cosine_similarity((x - x0).flatten(), moved.flatten(), dim=0) > before


def test_what_is_masked_does_not_count() -> None:
    clean, target, away, predicted = torch.randn(4, 16, 6, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(6, 4)
    mask[:3] = 1
    made, plain, sigma = (
        options(reflexflow_beta1=3.0, reflexflow_beta2=0.5),
        LossOptions(),
        torch.tensor([0.4]),
    )

    def loss(predicted: torch.Tensor, mask: torch.Tensor | None) -> float:
        bias = rollout.Bias(predicted, away)
        return rollout.ReflexFlow(made, plain).loss(predicted, target, sigma, bias, mask).item()

    changed = predicted.clone()
    changed[:, 3:] += 1.0
    assert loss(predicted, mask) == pytest.approx(loss(changed, mask), rel=1e-6)
    assert loss(predicted, None) != pytest.approx(loss(changed, None), rel=1e-3)
    assert loss(predicted, torch.ones(6, 4)) == pytest.approx(loss(predicted, None), rel=1e-6)
    nothing = torch.nn.Parameter(predicted.clone())
    reflex, bias = rollout.ReflexFlow(made, plain), rollout.Bias(clean, away)
    reflex.loss(nothing, target, sigma, bias, torch.zeros(6, 4)).backward()
    assert (nothing.grad == 0).all()


def test_without_its_terms_it_is_the_plain_loss() -> None:
    clean, target, away, predicted = torch.randn(4, 16, 6, 4, generator=torch.Generator().manual_seed(1))
    made, losses, sigma = options(reflexflow_alpha=0, reflexflow_beta1=0), LossOptions(), torch.tensor([0.4])
    bias = rollout.Bias(clean, away)
    found = rollout.ReflexFlow(made, losses).loss(predicted, target, sigma, bias, None)
    assert torch.equal(found, velocity_loss(predicted[None], target[None], sigma, losses))


# --- mistakes, and flags without effect ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_step_offset": -1}, "max_step_offset is -1; it must be 0 or more"),
        ({"step_size": 0.0}, "step_size is 0.0; it must be above 0 and at most 1"),
        ({"step_size": 20.0}, "step_size is 20.0"),
        ({"probability": 50.0}, "probability is 50.0; it must be from 0 to 1"),
        ({"prob_end": float("nan")}, "prob_end is nan"),
        ({"ramp_steps": -5}, "ramp_steps is -5"),
        ({"start_step": -5}, "start_step is -5"),
        ({"reflexflow_alpha": -1.0}, "reflexflow_alpha is -1.0; it must be 0 or more"),
        ({"reflexflow_beta1": float("inf")}, "reflexflow_beta1 is inf"),
        ({"sampler": "unipc"}, "sampler unipc cannot be used here: the model walks by Euler's method"),
        ({"order": 2}, "order 2 cannot be used here: Euler's method, by which the model walks, has order 1"),
    ],
)
def test_mistakes(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"--scheduled_sampling_{message}"):
        options(**given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, []),
        ({"probability": 0.5, "step_size": 0.1}, ["step_size", "probability"]),
        ({"reflexflow": False}, ["reflexflow"]),
        ({"max_step_offset": 3, "probability": 0.5}, []),
        ({"max_step_offset": 3}, ["max_step_offset"]),
        ({"max_step_offset": 3, "probability": 0.5, "ramp_steps": 9}, ["probability"]),
        ({"max_step_offset": 3, "prob_end": 0.0, "ramp_steps": 9}, ["max_step_offset"]),
        ({"max_step_offset": 3, "probability": 0.5, "prob_end": 0.9}, ["prob_end"]),
        (
            {"max_step_offset": 3, "probability": 0.5, "reflexflow": False, "reflexflow_beta1": 1.0},
            ["reflexflow_beta1"],
        ),
    ],
)
def test_flags_without_effect_are_told(given: dict[str, object], told: list[str]) -> None:
    sentences = list(options(**given).adjustments())
    assert [sentence.partition(" has no effect: ")[0] for sentence in sentences] == [
        f"--scheduled_sampling_{name}" for name in told
    ]
