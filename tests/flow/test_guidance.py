"""Classifier-free guidance: its formula, where it acts, and its norm."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from library.flow.guidance import guided, renormalised
from library.flow.solver import sampler_sigmas
from library.options.request import ImageRequest


class Recorder:
    """A velocity that depends on the condition, and remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[float], list[str]]] = []

    def __call__(self, x_BCHW: Tensor, sigma_B: Tensor, conditions: Sequence[str]) -> Tensor:
        assert sigma_B.dtype == torch.float32
        self.calls.append((len(x_BCHW), sigma_B.tolist(), list(conditions)))
        scale = torch.tensor([len(c) for c in conditions], dtype=torch.float32).view(-1, 1, 1, 1)
        return torch.tanh(x_BCHW * scale) + 0.1 * scale


def picture(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def by_hand(c: Tensor, u: Tensor, scale: float, renorm: float) -> Tensor:
    """One sample at a time, with Python numbers, as the reference tool does it."""
    v = u + scale * (c - u)
    if renorm > 0:
        for i in range(len(v)):
            limit, norm = renorm * c[i].norm().item(), v[i].norm().item()
            if norm >= limit:
                v[i] = v[i] * (limit / norm)
    return v


@pytest.mark.parametrize("renorm", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_guidance_equals_the_formula_written_by_hand(scale: float, renorm: float) -> None:
    x, recorder = picture(), Recorder()
    request = ImageRequest(guidance_scale=scale, renorm_cfg=renorm, cfg_trunc_ratio=1.0)
    found = guided(recorder, ["aa", "bbb"], ["n", ""], request)(x, 0.9)
    sigma = torch.full((2,), 0.9)
    c, u = recorder(x, sigma, ["aa", "bbb"]), recorder(x, sigma, ["n", ""])
    assert torch.allclose(found, by_hand(c, u, scale, renorm), atol=1e-6)


def test_prompt_and_negative_prompt_go_through_the_model_together() -> None:
    recorder = Recorder()
    request = ImageRequest(cfg_trunc_ratio=1.0)
    guided(recorder, ["aa", "bbb"], ["n", ""], request)(picture(), 0.5)
    assert recorder.calls == [(4, [0.5] * 4, ["aa", "bbb", "n", ""])]


@pytest.mark.parametrize(("ratio", "steps"), [(0.25, 24), (0.5, 31), (1.0, 36), (0.0, 0)])
def test_guidance_acts_in_the_noisy_part_of_the_way_only(ratio: float, steps: int) -> None:
    recorder = Recorder()
    velocity_at = guided(recorder, ["aa"], [""], ImageRequest(cfg_trunc_ratio=ratio))
    for sigma in sampler_sigmas(36, 6.0)[:-1]:
        velocity_at(picture(1), sigma)
    assert [size for size, _, _ in recorder.calls] == [2] * steps + [1] * (36 - steps)


@pytest.mark.parametrize("scale", [1.0, 1 + 9e-7, 1 - 9e-7])
def test_scale_one_needs_no_negative_prompt(scale: float) -> None:
    recorder = Recorder()
    guided(recorder, ["aa"], [""], ImageRequest(guidance_scale=scale))(picture(1), 0.99)
    assert recorder.calls[0][0] == 1


def test_a_scale_near_one_guides() -> None:
    recorder = Recorder()
    guided(recorder, ["aa"], [""], ImageRequest(guidance_scale=1 + 2e-6))(picture(1), 0.99)
    assert recorder.calls[0][0] == 2


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_one_after_the_other_gives_the_same_from_smaller_batches(scale: float) -> None:
    x, together, apart = picture(), Recorder(), Recorder()
    request = ImageRequest(guidance_scale=scale, cfg_trunc_ratio=0.5)
    arguments = ["aa", "bbb"], ["n", ""], request
    for sigma in (0.9, 0.3):
        expected = guided(together, *arguments)(x, sigma)
        assert torch.allclose(guided(apart, *arguments, sequential=True)(x, sigma), expected, atol=1e-6)
    guided_calls = [] if scale == 1.0 else [(2, [pytest.approx(0.9)] * 2, ["n", ""])]
    assert apart.calls == [
        (2, [pytest.approx(0.9)] * 2, ["aa", "bbb"]),
        *guided_calls,
        (2, [pytest.approx(0.3)] * 2, ["aa", "bbb"]),
    ]


def test_a_velocity_of_zero_stays_zero() -> None:
    zero = torch.zeros(1, 2, 3, 3)
    assert torch.equal(renormalised(zero, zero, 1.0), zero)
    assert torch.equal(renormalised(zero, torch.ones_like(zero), 1.0), zero)
