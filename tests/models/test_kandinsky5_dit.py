"""The network against diffusers' own, and against itself: batches, precision, what it refuses."""

import types

import pytest
import torch
from diffusers.models.transformers import transformer_kandinsky

from library.core.errors import ConfigError
from library.models.kandinsky5_dit import Attention, Kandinsky5DiT
from library.models.kandinsky5_format import parameter_shapes
from library.nn import products
from tests.models.kandinsky5_pairs import make_inputs, make_pair, make_params, make_theirs

TASKS = {"t2i": 16, "i2i": 33}
BATCHES = {
    "one": ((5,), (4, 4)),
    "one word": ((1,), (2, 8)),
    "same sizes": ((6, 6), (4, 6)),
    "all different": ((9, 1, 40), (8, 6), (4, 4), (2, 12)),
}
ODD = {"model_dim": 80, "head_dim": 20, "axes_dims": (8, 4, 8), "ff_dim": 96, "n_text_blocks": 1}


def relative(ours, theirs):
    ours, theirs = (torch.cat([t.float().flatten() for t in each]) for each in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()


def gradients(outputs, model, inputs):
    """Gradients of a random projection: to the inputs, and to the weights by name."""
    draw = torch.Generator().manual_seed(3)
    total = sum((out * torch.randn(out.shape, generator=draw)).sum() for out in outputs)
    names, weights = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(total, [*inputs.leaves(), *weights])
    count = len(inputs.leaves())
    return found[:count], dict(zip(names, found[count:], strict=True))


def wanting(inputs):
    for leaf in inputs.leaves():
        leaf.requires_grad_()
    return inputs


@pytest.mark.parametrize("channels", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("batch", BATCHES)
def test_output_and_gradients_are_those_of_diffusers(channels, batch):
    """With rotated queries and keys rounded to bf16 as theirs are: mostly 3e-7, but where a sum in another
    order ends on the other side of a step of bf16, the whole step shows."""
    params = make_params(in_channels=channels)
    pair, (lengths, *sizes) = make_pair(params), BATCHES[batch]
    inputs = wanting(make_inputs(params, lengths, *sizes))
    ours, theirs = inputs.ours(pair.ours), inputs.theirs(pair.theirs)
    assert relative(ours, theirs) < 4e-5
    to_inputs, to_weights = gradients(ours, pair.ours, inputs)
    inputs_expected, expected = gradients(theirs, pair.theirs, inputs)
    assert relative(to_inputs, inputs_expected) < 2e-4
    assert relative(to_weights.values(), [expected[name] for name in to_weights]) < 2e-4


@pytest.fixture
def unrounded(monkeypatch):
    """diffusers without its rounding of rotated queries and keys."""

    class Torch(types.ModuleType):
        bfloat16 = torch.float32

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(transformer_kandinsky, "torch", Torch("torch"))


@pytest.mark.parametrize("changes", [{}, {"in_channels": 33}, ODD], ids=["t2i", "i2i", "odd sizes"])
def test_without_rounding_every_gradient_is_that_of_diffusers(unrounded, changes):
    params = make_params(**changes)
    pair, inputs = make_pair(params), wanting(make_inputs(params, (9, 1, 40), (8, 6), (4, 4), (2, 12)))
    rounded = inputs.ours(pair.ours)
    pair.ours.round_rotated = False
    ours, theirs = inputs.ours(pair.ours), inputs.theirs(pair.theirs)
    assert relative(ours, theirs) < 2e-6
    assert 1e-5 < relative(rounded, theirs) < 1e-2
    to_inputs, to_weights = gradients(ours, pair.ours, inputs)
    inputs_expected, expected = gradients(theirs, pair.theirs, inputs)
    assert relative(to_inputs, inputs_expected) < 1e-5
    total = torch.cat([grad.flatten() for grad in expected.values()]).norm()
    for name, grad in to_weights.items():
        # the second term is for gradients of zero and their rounding: a text of one token has no choice
        assert (grad - expected[name]).norm() < 1e-5 * expected[name].norm() + 1e-7 * total, name


def in_bf16(model):
    """As both loaders keep a bf16 model: time in fp32; with diffusers modulation too."""
    for name, weight in model.named_parameters():
        theirs_too = isinstance(model, Kandinsky5DiT) or "modulation" not in name
        if not name.startswith("time_embeddings") and theirs_too:
            weight.data = weight.data.bfloat16()
    return model


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of diffusers
@torch.no_grad()
@pytest.mark.parametrize("fast", [True, False], ids=["bf16 products", "fp32 products"])
def test_bf16(monkeypatch, fast):
    """Within 1 % of the same weights in fp32, as diffusers' bf16 is: over 16 seeds both are 0.7 % off."""
    monkeypatch.setattr(products, "_cpu_is_fast_in", lambda dtype: fast)
    params = make_params(n_visual_blocks=4)
    exact, half = make_pair(params), make_pair(params)
    for weight in (*exact.ours.parameters(), *half.theirs.parameters()):
        weight.copy_(weight.bfloat16())
    exact.ours.round_rotated = False
    inputs = make_inputs(params, (40, 31), (8, 8))
    truth = inputs.ours(exact.ours)
    theirs = inputs.to(torch.bfloat16).theirs(in_bf16(half.theirs))
    ours_model = in_bf16(half.ours)
    official = inputs.ours(ours_model)
    ours_model.round_rotated = False
    ours = inputs.ours(ours_model)
    assert ours[0].dtype == torch.bfloat16
    assert relative(ours, truth) < 0.01 and relative(official, theirs) < 0.015
    assert relative(ours, truth) < 1.25 * relative(theirs, truth)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_is_its_samples_alone(dtype):
    model = make_pair(make_params(in_channels=33)).ours
    model.round_rotated = False
    model = model if dtype == torch.float32 else in_bf16(model)
    inputs = make_inputs(model.params, (9, 1, 40, 300), (8, 6), (4, 4), (2, 12), (6, 6))
    together = inputs.ours(model)
    assert [tuple(each.shape) for each in together] == [(16, 8, 6), (16, 4, 4), (16, 2, 12), (16, 6, 6)]
    for index in range(4):
        one = slice(index, index + 1)
        alone = model(inputs.x[one], inputs.time_B[one], inputs.tokens[one], inputs.pooled_BP[one])
        assert relative(together[one], alone) < (2e-6 if dtype == torch.float32 else 1e-2)


def test_fp32_islands():
    """Time is told apart in bf16, where 1000 neighbours are the same number, and modulation stays fp32."""
    model = in_bf16(make_pair(make_params()).ours)
    times = torch.linspace(0, 1000, 1001)
    assert len(model.time_embeddings(times).unique(dim=0)) == 1001
    assert model.text_transformer_blocks[0].text_modulation(torch.zeros(1, 32))[0].dtype == torch.float32
    assert model.dtype == torch.bfloat16


def test_nothing_is_kept_for_frozen_weights():
    model = make_pair(make_params()).ours.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = make_inputs(model.params, (5,), (4, 4)).ours(model)
    assert not kept and not output[0].requires_grad


@pytest.mark.parametrize("channels", TASKS.values(), ids=TASKS)
def test_names_and_shapes_are_those_of_the_format_and_of_diffusers(channels):
    params = make_params(in_channels=channels)
    theirs = {name: tuple(weight.shape) for name, weight in make_theirs(params).state_dict().items()}
    with torch.device("meta"):
        ours = Kandinsky5DiT(params).state_dict()
    assert {name: tuple(weight.shape) for name, weight in ours.items()} == theirs
    assert dict(parameter_shapes(params)) == theirs


class TestRefusals:
    def run(self, shape=(16, 4, 4), tokens=3):
        model = make_pair(make_params(n_text_blocks=1, n_visual_blocks=1)).ours
        with torch.no_grad():
            return model([torch.zeros(shape)], torch.zeros(1), [torch.zeros(tokens, 20)], torch.zeros(1, 24))

    def test_latents_that_do_not_fit(self):
        for shape in ((16, 5, 4), (16, 4, 3), (33, 4, 4)):
            with pytest.raises(ValueError, match="16 channels, and a height and width divisible by 2"):
                self.run(shape)

    def test_texts(self):
        assert len(self.run(tokens=1024)) == 1
        with pytest.raises(
            ConfigError, match="1025 tokens is too long .* 1024: lower --qwen_max_token_length"
        ):
            self.run(tokens=1025)
        with pytest.raises(ValueError, match="no tokens"):
            self.run(tokens=0)

    def test_pictures(self):
        assert self.run((16, 2, 256))[0].shape == (16, 2, 256)
        with pytest.raises(ConfigError, match="2064x16 pixels is too large .* 2048 along a side"):
            self.run((16, 2, 258))
        with pytest.raises(ConfigError, match="16x2064 pixels"):
            self.run((16, 258, 2))


def test_settings_of_attention_reach_every_layer():
    model = Kandinsky5DiT(make_params())
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    assert len(layers) == 2 + 2 * 3 and not model.round_rotated
    model.use_attention("sdpa")
    model.round_rotated = True
    assert model.round_rotated and {(layer.kernel, layer.round_rotated) for layer in layers} == {
        ("sdpa", True)
    }
