"""The house convention of noise, sigma and velocity."""

from __future__ import annotations

import torch

from library.core import seeds
from library.flow.path import draw_noise, initial_noise, mix, velocity_target


def test_path_runs_from_picture_to_noise_at_its_velocity() -> None:
    x0, noise = draw_noise((2, 4, 3, 3), 1, 0), draw_noise((2, 4, 3, 3), 1, 1)
    assert torch.equal(mix(x0, noise, torch.zeros(2)), x0)
    assert torch.equal(mix(x0, noise, torch.ones(2)), noise)
    early, late = torch.tensor([0.2, 0.6]), torch.tensor([0.3, 0.7])
    slope = (mix(x0, noise, late) - mix(x0, noise, early)) / 0.1
    assert torch.allclose(slope, velocity_target(x0, noise), atol=1e-5)


def test_mixing_is_done_in_fp32() -> None:
    x0, noise = torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), 2.0)
    mixed = mix(x0.bfloat16(), noise.bfloat16(), torch.tensor([0.001]))
    assert mixed.dtype == torch.float32
    assert abs(mixed.item() - 1.001) < 1e-6


def test_training_noise_is_a_function_of_its_key_and_leaves_global_randomness_alone() -> None:
    before = torch.get_rng_state()
    first = draw_noise((4, 2, 2), 7, 3, 0, 1)
    assert torch.equal(first, draw_noise((4, 2, 2), 7, 3, 0, 1))
    assert not torch.equal(first, draw_noise((4, 2, 2), 7, 3, 0, 2))
    assert torch.equal(before, torch.get_rng_state())


def test_initial_noise_is_plain_torch_noise_of_the_seed() -> None:
    expected = torch.randn(1, 16, 8, 6, generator=torch.Generator().manual_seed(1234))
    assert torch.equal(initial_noise((16, 8, 6), 1234), expected[0])
    assert not torch.equal(initial_noise((4,), 5), torch.randn(4, generator=seeds.generator(5)))
