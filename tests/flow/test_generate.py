"""From requests to pictures, with a model made of arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from library.core.errors import NonFiniteError
from library.flow.generate import ImageModel, batches, generate, to_uint8
from library.flow.path import initial_noise
from library.options.request import ImageRequest

REQUEST = ImageRequest(prompt="a", width=64, height=48, steps=6, seed=11, cfg_trunc_ratio=0.5)


def velocity(x_BCHW: Tensor, sigma_B: Tensor, conditions: Sequence[float]) -> Tensor:
    """Each sample on its own: the picture depends on its condition and its noise."""
    condition_B111 = torch.tensor(conditions).view(-1, 1, 1, 1)
    return torch.sin(2 * x_BCHW) + condition_B111 * sigma_B.view(-1, 1, 1, 1)


def decode(latents_BCHW: Tensor) -> Tensor:
    return torch.tanh(latents_BCHW[:, :3]).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def model(**changes: object) -> ImageModel[float]:
    return replace(ImageModel(velocity, decode, torch.device("cpu")), **changes)


def draw(*requests: ImageRequest, condition: float = 0.5) -> list[Tensor]:
    return generate(
        model(), requests, [condition] * len(requests), [-condition] * len(requests), progress=False
    )


def test_pictures_have_the_size_asked_for() -> None:
    (found,) = draw(REQUEST)
    assert found.shape == (48, 64, 3)
    assert found.dtype == torch.uint8


def test_each_seed_is_a_picture_whatever_it_is_drawn_with() -> None:
    requests = [replace(REQUEST, seed=seed) for seed in (11, 0, 2**62)]
    together = draw(*requests)
    alone = [draw(request)[0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert (one.int() - other.int()).abs().max() <= 1  # sums over a batch may be rounded differently
    assert (together[0].int() - together[1].int()).abs().max() > 100


def test_one_after_the_other_draws_the_same_picture_from_smaller_batches() -> None:
    sizes: list[int] = []

    def recorded(x_BCHW: Tensor, *others: object) -> Tensor:
        sizes.append(len(x_BCHW))
        return velocity(x_BCHW, *others)

    subject = model(velocity=recorded, sequential=True)
    (found,) = generate(subject, [REQUEST], [0.5], [-0.5], progress=False)
    assert (found.int() - draw(REQUEST)[0].int()).abs().max() <= 1
    assert set(sizes) == {1} and len(sizes) > REQUEST.steps


def test_a_perfect_model_draws_its_picture() -> None:
    x0 = torch.rand(16, 6, 8) * 2 - 1
    noise = initial_noise((16, 6, 8), 11)
    perfect = model(velocity=lambda x, sigma, conditions: (noise - x0).expand_as(x))
    (found,) = generate(perfect, [REQUEST], ["c"], ["n"], progress=False)
    assert (found.int() - to_uint8(decode(x0.unsqueeze(0)))[0].int()).abs().max() <= 1


def test_drawing_touches_no_global_randomness_and_builds_no_graph() -> None:
    weight = torch.nn.Parameter(torch.ones(()))
    seen: list[bool] = []

    def trained(x: Tensor, sigma: Tensor, conditions: Sequence[float]) -> Tensor:
        seen.append((weight * x).requires_grad)
        return velocity(x, sigma, conditions)

    before = torch.get_rng_state()
    generate(model(velocity=trained), [REQUEST], [0.1], [0.2], progress=False)
    assert torch.equal(before, torch.get_rng_state())
    assert seen and not any(seen)


@pytest.mark.parametrize(
    "broken",
    [
        {"velocity": lambda x, sigma, conditions: x * float("nan")},
        {"decode": lambda latents: decode(latents) / 0},
    ],
)
def test_not_a_number_is_reported(broken: dict[str, object]) -> None:
    with pytest.raises(NonFiniteError, match="fp32"):
        generate(model(**broken), [REQUEST], [0.1], [0.1], progress=False)


def test_bytes_are_rounded_and_clamped() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 7.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(pixels)[0, 0, :, 0].tolist() == [0, 0, 128, 191, 255, 255]


def test_requests_of_equal_settings_share_a_batch() -> None:
    requests = [
        replace(REQUEST, seed=1),
        replace(REQUEST, width=32),
        replace(REQUEST, seed=2, prompt="b"),
        replace(REQUEST, negative_prompt="n"),
        replace(REQUEST, width=32, steps=7),
    ]
    assert batches(requests, 2) == [[0, 2], [3], [1], [4]]
    assert batches(requests, 1) == [[0], [2], [3], [1], [4]]
