"""Sigma as drawn in training: the six samplings, their shifts and densities."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from hypothesis import given
from hypothesis import strategies as st

from library.core.errors import ConfigError
from library.flow.timesteps import TABLE_SIZE, draw_sigma, resolution_shift, shift, sigma_at
from library.options.timesteps import SAMPLINGS, TimestepOptions

TOKENS_AT_1024 = (1024 // 16) ** 2

# mean, 5 %, 50 % and 95 % of sigma at 1024 px, as measured of the reference tool (a finite sample: +-0.02)
MEASURED = {
    "shift": (0.819, 0.541, 0.856, 0.967),
    "nextdit_shift": (0.684, 0.147, 0.765, 0.983),
    "flux_shift": (0.723, 0.372, 0.757, 0.942),
    "uniform": (0.507, 0.054, 0.507, 0.954),
    "sigmoid": (0.492, 0.165, 0.489, 0.823),
    "sigma": (0.770, 0.232, 0.856, 0.991),
}


def options(sampling: str, **others: object) -> TimestepOptions:
    return TimestepOptions(timestep_sampling=sampling, **others)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_keyed_draws_have_the_reference_distribution(sampling: str) -> None:
    draws = [
        draw_sigma(options(sampling), TOKENS_AT_1024, 42, step, 0, slot)
        for step in range(2000)
        for slot in range(4)
    ]
    cuts = statistics.quantiles(draws, n=20)
    found = (statistics.fmean(draws), cuts[0], cuts[9], cuts[18])
    assert found == pytest.approx(MEASURED[sampling], abs=0.025)


def test_a_draw_depends_on_its_key_alone() -> None:
    def draw(*key: int, seed: int = 1) -> float:
        return draw_sigma(options("shift"), 256, seed, *key)

    assert draw(3, 1, 2) == draw(3, 1, 2)
    distinct = {draw(3, 1, 2), draw(4, 1, 2), draw(3, 2, 2), draw(3, 1, 3), draw(3, 1, 2, seed=2)}
    assert len(distinct) == 5


@pytest.mark.parametrize("tokens", [16, 256, 1024, 4096, 9216])
@given(u=st.floats(0.001, 0.999))
def test_nextdit_shift_is_the_formula_of_the_official_recipe(tokens: int, u: float) -> None:
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256)
    expected = math.exp(mu) / (math.exp(mu) + (1 / u - 1))
    assert sigma_at(options("nextdit_shift"), tokens, u) == pytest.approx(expected, rel=1e-12)


def test_resolution_shift_at_its_two_anchors() -> None:
    assert resolution_shift(256) == pytest.approx(math.exp(0.5))
    assert resolution_shift(4096) == pytest.approx(math.exp(1.15))


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0, 6.0])
def test_table_of_the_sigma_sampling_is_that_of_diffusers(factor: float) -> None:
    table = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TABLE_SIZE, shift=factor).sigmas.tolist()
    chosen = options("sigma", discrete_flow_shift=factor)
    ours = [sigma_at(chosen, 256, (row + 0.5) / TABLE_SIZE) for row in range(TABLE_SIZE)]
    assert ours == pytest.approx(table, abs=1e-6)


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        ("logit_normal", {"logit_mean": 0.3, "logit_std": 0.7}),
        ("mode", {"mode_scale": 0.8}),
        ("mode", {}),
        ("uniform", {}),
        ("none", {}),
        ("cosmap", {}),
    ],
)
def test_weighting_density_is_that_of_diffusers(scheme: str, settings: dict[str, float]) -> None:
    chosen = options("sigma", weighting_scheme=scheme, **settings)
    ours = [sigma_at(chosen, 256, (i + 0.5) / 4000) for i in range(4000)]
    generator = torch.Generator().manual_seed(0)
    density = compute_density_for_timestep_sampling(
        scheme, 200_000, chosen.logit_mean, chosen.logit_std, chosen.mode_scale, generator=generator
    )
    table = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TABLE_SIZE, shift=6.0).sigmas
    theirs = table[(density * TABLE_SIZE).long()].tolist()
    at = (1, 3, 9, 15, 17)
    our_cuts, their_cuts = statistics.quantiles(ours, n=20), statistics.quantiles(theirs, n=20)
    assert [our_cuts[i] for i in at] == pytest.approx([their_cuts[i] for i in at], abs=0.01)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@given(u=st.floats(0, 1), tokens=st.integers(1, 65536))
def test_sigma_stays_on_the_path(sampling: str, u: float, tokens: int) -> None:
    assert 0 <= sigma_at(options(sampling), tokens, u) <= 1


@given(u=st.floats(0, 1), scale=st.floats(-1, 2 / (math.pi - 2)))
def test_mode_density_stays_in_the_table(u: float, scale: float) -> None:
    chosen = options("sigma", weighting_scheme="mode", mode_scale=scale, discrete_flow_shift=1.0)
    assert 1 / TABLE_SIZE <= sigma_at(chosen, 256, u) <= 1


@given(sigma=st.floats(0, 1), factor=st.floats(0.01, 100))
def test_shift_is_undone_by_its_inverse(sigma: float, factor: float) -> None:
    assert shift(shift(sigma, factor), 1 / factor) == pytest.approx(sigma, abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_prediction_type": "additive"}, "use raw"),
        ({"model_prediction_type": "sigma_scaled"}, "use raw"),
        ({"timestep_sampling": "sigma", "weighting_scheme": "mode", "mode_scale": 1.8}, "1.7519"),
        ({"discrete_flow_shift": 0.0}, "above 0"),
        ({"sigmoid_scale": float("nan")}, "above 0"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TimestepOptions(**settings)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_range_cuts_the_density_off_and_keeps_its_form(sampling: str) -> None:
    cut, whole = options(sampling, min_timestep=300, max_timestep=700), options(sampling)
    grid = [(i + 0.5) / 4000 for i in range(4000)]
    ours = sorted(sigma_at(cut, TOKENS_AT_1024, u) for u in grid)
    kept = sorted(s for s in (sigma_at(whole, TOKENS_AT_1024, u) for u in grid) if 0.3 <= s <= 0.7)
    assert 0.3 <= ours[0] and ours[-1] <= 0.7
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert ours[int(share * 4000)] == pytest.approx(kept[int(share * len(kept))], abs=0.01)


@pytest.mark.parametrize("scheme", ["logit_normal", "mode"])
def test_a_range_with_a_weighting_scheme(scheme: str) -> None:
    cut = options("sigma", weighting_scheme=scheme, min_timestep=500)
    ours = [sigma_at(cut, 256, (i + 0.5) / 500) for i in range(500)]
    assert min(ours) >= 0.5 and max(ours) > 0.95


@pytest.mark.parametrize("bounds", [(500, 500), (700, 300), (-1, 500), (0, 1001)])
def test_a_range_without_noise_levels_is_refused(bounds: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="leave no noise level"):
        options("shift", min_timestep=bounds[0], max_timestep=bounds[1])
