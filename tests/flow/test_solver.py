"""The sampler's steps and Euler's method."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from library.flow.path import initial_noise
from library.flow.solver import sampler_sigmas, shifted_sigmas, solve


@pytest.mark.parametrize("factor", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 36, 1000])
def test_sigmas_are_those_of_diffusers(steps: int, factor: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=factor)
    scheduler.set_timesteps(steps)
    assert sampler_sigmas(steps, factor) == pytest.approx(scheduler.sigmas.tolist(), abs=2e-7)


def test_timesteps_of_36_steps_at_shift_6_are_the_documented_ones() -> None:
    timesteps = [1000 * sigma for sigma in sampler_sigmas(36, 6.0)]
    assert timesteps[:3] == pytest.approx([1000, 995.15, 990.06], abs=0.005)
    assert timesteps[-4:] == pytest.approx([286.7, 176.0, 34.8, 0], abs=0.05)


@pytest.mark.parametrize("factor", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 1000])
def test_shifted_sigmas_are_the_official_grid_of_kandinsky(steps: int, factor: float) -> None:
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    official = factor * u / (1 + (factor - 1) * u)
    assert shifted_sigmas(steps, factor) == pytest.approx(official.tolist(), abs=1e-12)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=factor)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    assert shifted_sigmas(steps, factor) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_the_last_of_50_steps_at_shift_3_are_the_documented_ones() -> None:
    found = shifted_sigmas(50, 3.0)
    assert len(found) == 51
    assert found[-4:] == pytest.approx([0.1607, 0.1111, 0.0577, 0], abs=5e-5)


def test_a_perfect_model_leads_back_to_the_picture() -> None:
    x0 = torch.rand(2, 4, 6, 6)
    noise = torch.stack([initial_noise((4, 6, 6), 1), initial_noise((4, 6, 6), 2)])
    found = solve(lambda x, sigma: noise - x0, noise, sampler_sigmas(36, 6.0))
    assert torch.allclose(found, x0, atol=1e-5)


def test_a_model_that_knows_only_where_it_is_leads_back_too() -> None:
    x0 = torch.rand(2, 4, 6, 6)
    noise = initial_noise((2, 4, 6, 6), 1)
    found = solve(lambda x, sigma: (x - x0) / sigma, noise, sampler_sigmas(10, 6.0))
    assert torch.allclose(found, x0, atol=1e-5)


def test_steps_are_those_of_a_loop_written_by_hand() -> None:
    sigmas = sampler_sigmas(5, 6.0)
    calls: list[float] = []

    def velocity_at(x: torch.Tensor, sigma: float) -> torch.Tensor:
        calls.append(sigma)
        return torch.sin(3 * x) + sigma

    x = start = initial_noise((1, 1, 4, 4), 3)
    for i in range(5):
        x = x + (sigmas[i + 1] - sigmas[i]) * (torch.sin(3 * x) + sigmas[i])
    ticks: list[int] = []
    found = solve(velocity_at, start, sigmas, on_step=lambda: ticks.append(1))
    assert torch.equal(found, x)
    assert calls == sigmas[:-1]
    assert len(ticks) == 5


def exact_velocity(x: torch.Tensor, sigma: float, mean: float = 0.5, std: float = 0.3) -> torch.Tensor:
    """The velocity of pictures whose pixels are normal numbers: noise and x0 are linear in x given x."""
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    surplus = x - (1 - sigma) * mean
    return sigma * surplus / variance - (mean + (1 - sigma) * std**2 * surplus / variance)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpmsolver++", 2)])
def test_the_error_falls_with_the_order_of_the_sampler(sampler: str, order: int) -> None:
    noise = initial_noise((1, 1, 16, 16), 5).double()
    exact = 0.5 + 0.3 * noise  # the flow keeps each number's place in the normal distribution

    def error(steps: int) -> float:
        found = solve(exact_velocity, noise, sampler_sigmas(steps, 1.0), sampler=sampler)
        return (found - exact).abs().max().item()

    assert error(40) / error(80) > 0.8 * 2**order
    if sampler == "heun":
        euler = solve(exact_velocity, noise, sampler_sigmas(40, 1.0))
        assert error(40) < 0.3 * (euler - exact).abs().max().item()


@pytest.mark.parametrize("sampler", ["heun", "dpmsolver++"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_perfect_model_leads_every_sampler_back(sampler: str, steps: int) -> None:
    x0, noise = torch.rand(1, 4, 6, 6), initial_noise((1, 4, 6, 6), 1)
    ticks: list[int] = []
    found = solve(
        lambda x, sigma: noise - x0,
        noise,
        sampler_sigmas(steps, 6.0),
        on_step=lambda: ticks.append(1),
        sampler=sampler,
    )
    assert torch.allclose(found, x0, atol=1e-5)
    assert len(ticks) == steps


def test_dpm_solver_is_that_of_diffusers() -> None:
    from diffusers import DPMSolverMultistepScheduler

    sigmas = sampler_sigmas(12, 3.0)
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    scheduler.set_timesteps(12)
    scheduler.sigmas = torch.tensor([1 - 1e-6, *sigmas[1:]], dtype=torch.float64)  # it cannot begin at 1
    x = start = initial_noise((1, 1, 8, 8), 3).double()
    for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        x = scheduler.step(exact_velocity(x, sigma), timestep, x).prev_sample
    found = solve(exact_velocity, start, sigmas, sampler="dpmsolver++")
    assert torch.allclose(found, x, atol=1e-3)
