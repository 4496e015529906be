"""Loading the transformer, and the house convention around it."""

import pytest
import torch
from safetensors.torch import load_file

from library.core.errors import CheckpointError, ConfigError
from library.data.batch import Condition
from library.models.lumina2 import load_nextdit, velocity
from library.models.lumina2_format import inspect_lumina2

CPU = torch.device("cpu")


def load(path, dtype=torch.float32, **options):
    return load_nextdit(path, device=CPU, dtype=dtype, **options)


def predict(model):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 8, 8, generator=generator)
    conditions = [Condition(torch.randn(length, 128, generator=generator)) for length in (5, 9)]
    with torch.no_grad():
        return velocity(model, x, torch.tensor([0.2, 0.7]), conditions)


def test_every_layout_is_the_same_model(nano_in):
    expected = predict(load(nano_in("original").dit))
    assert 0.1 < expected.std() < 10
    for layout in ("comfyui", "all_in_one"):
        assert torch.equal(predict(load(nano_in(layout).dit)), expected)
    diffusers = predict(load(nano_in("diffusers").dit))  # its query and key norms have another epsilon
    assert 0 < (diffusers - expected).norm() / expected.norm() < 1e-4
    assert torch.equal(predict(load(nano_in("sharded").dit)), diffusers)


def test_the_model_is_frozen_and_in_its_dtype(nano):
    model = load(nano.dit, torch.bfloat16)
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())
    dtypes = {name.partition(".")[0]: weight.dtype for name, weight in model.named_parameters()}
    assert dtypes.pop("t_embedder") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16} == {model.dtype}
    assert predict(model).dtype == torch.float32


def test_weights_are_those_of_the_file(nano):
    tensors = load_file(nano.dit)
    for name, weight in load(inspect_lumina2(nano.dit)).state_dict().items():
        assert torch.equal(weight, tensors[name])


def test_velocity_is_noise_minus_image_on_the_house_clock(nano):
    model = load(nano.dit)
    x, sigma = torch.randn(1, 16, 4, 4), torch.tensor([0.3])
    condition = Condition(torch.randn(4, 128))
    with torch.no_grad():
        own = model([x[0]], 1 - sigma, [condition.tokens_LD])[0]
        assert torch.equal(velocity(model, x, sigma, [condition])[0], -own)


def test_neighbouring_sigmas_are_told_apart_in_bf16(nano):
    """In bf16 0.9901 and 0.9921 are the same number."""
    model = load(nano.dit, torch.bfloat16)
    with torch.no_grad():
        features = model.t_embedder(torch.tensor([0.0079, 0.0099]))
    assert not torch.equal(features[0].bfloat16(), features[1].bfloat16())


def test_what_cannot_work_is_refused_before_loading(nano, tmp_path):
    with pytest.raises(ConfigError, match="'varlen' needs a CUDA device"):
        load(tmp_path / "not even there", attention="varlen")
    with pytest.raises(CheckpointError, match="it looks like a Gemma2"):
        load(nano.gemma2)
