"""Variants of the training noise: what they add, and that they depend on their key alone."""

import pytest
import torch

from library.core.errors import ConfigError
from library.flow.noise import perturbation, training_noise
from library.flow.path import draw_noise
from library.options.noise import NoiseOptions

SHAPE = (16, 24, 32)


def noise(mean_C=None, key=(1, 0, 0), **options):
    return training_noise(NoiseOptions(**options), SHAPE, mean_C, 7, *key)


def added(**options):
    return noise(**options) - draw_noise(SHAPE, 7, 1, 0, 0)


def test_plain_noise_is_untouched():
    assert torch.equal(noise(), draw_noise(SHAPE, 7, 1, 0, 0))
    assert torch.equal(noise(noise_offset=0.0, multires_noise_iterations=0), noise())


def test_noise_offset_adds_one_number_a_channel():
    offset = added(noise_offset=0.1)
    assert torch.allclose(offset, offset[:, :1, :1].expand(SHAPE), atol=1e-6)
    assert len(offset[:, 0, 0].unique()) == SHAPE[0]
    assert torch.allclose(added(noise_offset=0.2), 2 * offset, atol=1e-6)
    many = torch.cat([noise(key=(step, 0, 0), noise_offset=0.5).mean((1, 2)) for step in range(200)])
    assert many.std().item() == pytest.approx(0.5, rel=0.05)


def test_random_strength_is_between_none_and_all_of_it():
    whole = torch.stack([added_at(step, noise_offset=0.1) for step in range(50)])
    random = {"noise_offset": 0.1, "noise_offset_random_strength": True}
    part = torch.stack([added_at(step, **random) for step in range(50)])
    shares = part[:, 0] / whole[:, 0]
    assert shares.min() >= -1e-3 and shares.max() <= 1 + 1e-3
    assert shares.mean().item() == pytest.approx(0.5, abs=0.15)
    assert shares.std() > 0.2


def added_at(step, **options):
    return (noise(key=(step, 0, 0), **options) - draw_noise(SHAPE, 7, step, 0, 0)).mean((1, 2))


def test_adaptive_scale_follows_the_mean_of_the_latents():
    mean_C = torch.linspace(-2, 2, SHAPE[0])
    plain = added(noise_offset=0.1)
    adaptive = added(mean_C=mean_C, noise_offset=0.1, adaptive_noise_scale=0.05)
    expected = plain * ((0.1 + 0.05 * mean_C.abs()) / 0.1)[:, None, None]
    assert torch.allclose(adaptive, expected, atol=1e-5)
    negative = added(mean_C=mean_C, noise_offset=0.05, adaptive_noise_scale=-0.1)
    assert torch.allclose(negative[0], torch.zeros(()), atol=1e-6)  # 0.05 - 0.1 * 2 is below 0


def test_multires_noise_is_smoother_and_of_unit_variance():
    def neighbours(field):
        return (field[:, :, 1:] * field[:, :, :-1]).mean().item()

    coarse = noise(multires_noise_iterations=6, multires_noise_discount=0.8)
    assert coarse.std().item() == pytest.approx(1, abs=1e-5)
    assert neighbours(coarse) > 0.2 > 0.05 > abs(neighbours(noise()))
    none = noise(multires_noise_iterations=6, multires_noise_discount=0.0)
    assert abs(neighbours(none)) < 0.05


def test_perturbation_has_the_size_of_gamma_and_is_new_noise():
    extra = perturbation(NoiseOptions(ip_noise_gamma=0.1), SHAPE, 7, 1, 0, 0)
    assert extra.std().item() == pytest.approx(0.1, rel=0.05)
    assert (extra * noise()).mean().abs() < 0.01
    random = NoiseOptions(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True)
    sizes = torch.tensor([perturbation(random, SHAPE, 7, step, 0, 0).std() for step in range(50)])
    assert sizes.max() <= 0.105 and sizes.min() < 0.03


@pytest.mark.parametrize(
    "options",
    [{"noise_offset": 0.1}, {"multires_noise_iterations": 4}, {}],
    ids=["offset", "multires", "plain"],
)
def test_noise_depends_on_its_key_alone(options):
    assert torch.equal(noise(**options), noise(**options))
    assert not torch.equal(noise(**options), noise(key=(1, 0, 1), **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_offset": -1.0}, "--noise_offset is -1.0"),
        ({"adaptive_noise_scale": 0.1}, "--adaptive_noise_scale adds to --noise_offset"),
        ({"multires_noise_iterations": 3, "multires_noise_discount": 1.5}, "must be from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        NoiseOptions(**options)
