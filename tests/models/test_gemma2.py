"""The text encoder against transformers' own, with everything that is special about Gemma2 switched on."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2Model

from library.core.errors import CheckpointError, NonFiniteError
from library.core.seeds import generator
from library.models.gemma2 import encode_prompts, load_gemma2
from library.models.gemma2_tokenizer import load_gemma2_tokenizer

CPU = torch.device("cpu")
LAYOUTS = ["original", "comfyui", "all_in_one", "diffusers", "sharded"]
LENGTHS = [1, 5, 40, 12]


@pytest.fixture(scope="module")
def oracle():
    """A Gemma2 whose window is shorter than the texts and whose soft cap bites."""
    config = Gemma2Config(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=96,
        query_pre_attn_scalar=24,
        sliding_window=6,
        attn_logit_softcapping=3.0,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )
    model = Gemma2Model(config).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator(0, name))
        parameter.data = noise * (0.3 if noise.ndim == 1 else 2 / noise.shape[-1] ** 0.5)
    return model


@pytest.fixture(scope="module")
def encoder(oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma2")
    oracle.save_pretrained(folder)
    return load_gemma2(folder, device=CPU, dtype=torch.float32)


def random_ids(length):
    return torch.randint(4, 100, (length,), generator=generator(1, length)).tolist()


def hidden_states_before_last(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-2][0]


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_transformers(oracle, encoder, length):
    (features,) = encoder.encode([random_ids(length)])
    assert features.shape == (length, 64)
    assert relative_error(features, hidden_states_before_last(oracle, random_ids(length))) < 1e-6


def test_a_batch_of_different_lengths_equals_each_alone(oracle, encoder):
    batch = encoder.encode([random_ids(length) for length in LENGTHS])
    for length, features in zip(LENGTHS, batch, strict=True):
        assert relative_error(features, hidden_states_before_last(oracle, random_ids(length))) < 1e-5
        assert features.untyped_storage().nbytes() == features.nbytes  # keeps no padding alive


@pytest.mark.parametrize(
    "change", [{"sliding_window": 4096}, {"attn_logit_softcapping": 50.0}, {"query_pre_attn_scalar": 256}]
)
def test_the_comparison_would_notice(oracle, change):
    """Each special of Gemma2 moves the features by far more than the tolerance of the tests above."""
    other = Gemma2Model(
        Gemma2Config(**{**oracle.config.to_dict(), **change}, attn_implementation="eager")
    ).eval()
    other.load_state_dict(oracle.state_dict())
    expected = hidden_states_before_last(oracle, random_ids(40))
    assert relative_error(hidden_states_before_last(other, random_ids(40)), expected) > 1e-3


def test_last_layer_and_norm_are_not_built(oracle, encoder):
    names = {name.removeprefix("model.") for name, _ in encoder.named_parameters()}
    assert names == {n for n, _ in oracle.named_parameters() if not n.startswith(("layers.3.", "norm."))}
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.training


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_network(nano_in, layout):
    ids = [[2, 30, 31, 200, 5]]
    folder = nano_in("diffusers").gemma2  # some versions of transformers choose SDPA, without the soft cap
    oracle = Gemma2Model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    encoder = load_gemma2(nano_in(layout).gemma2, device=CPU, dtype=torch.float32)
    assert relative_error(encoder.encode(ids)[0], hidden_states_before_last(oracle, ids[0])) < 1e-6


@pytest.mark.parametrize("prefix", ["", "model.", "text_encoders.gemma2_2b.transformer.model."])
@pytest.mark.parametrize("order", ["extras first", "extras last", "reversed"])
def test_the_order_of_names_does_not_matter(nano_in, ordered_file, tmp_path, prefix, order):
    weights = load_file(nano_in("diffusers").gemma2 / "model.safetensors")
    named = {prefix + name: tensor for name, tensor in weights.items()}
    extras = {
        "lm_head.weight": weights["embed_tokens.weight"],
        "logit_scale": torch.ones(()),
        "spiece_model": torch.zeros(9, dtype=torch.uint8),
    }
    tensors = extras | named if order == "extras first" else named | extras
    tensors = dict(reversed(tensors.items())) if order == "reversed" else tensors
    file = ordered_file(tmp_path / "gemma2.safetensors", tensors)
    encoder = load_gemma2(file, device=CPU, dtype=torch.float32)
    for name, parameter in encoder.model.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_the_table_of_words_stays_where_it_is(nano_in):
    """In the file's dtype, while the layers go to another device or take another dtype."""
    ids = [[2, 30, 31, 200, 5], [7]]
    encoder = load_gemma2(nano_in("diffusers").gemma2, device=CPU, dtype=torch.bfloat16)
    expected = encoder.encode(ids)
    table = encoder.model.embed_tokens.weight
    rest = [p for p in encoder.parameters() if p is not table]
    assert encoder.device_bytes() >= sum(p.nbytes for p in rest)
    assert table.dtype == torch.float32 and {p.dtype for p in rest} == {torch.bfloat16} == {encoder.dtype}
    encoder.model.embed_tokens.weight.data = table.bfloat16()  # as it was when it went with the layers
    for ours, other in zip(encoder.encode(ids), expected, strict=True):
        assert torch.equal(ours, other)
    encoder.to("meta")
    assert encoder.device.type == "meta" and encoder.model.embed_tokens.weight.device == CPU


def test_stays_memory_mapped_on_the_cpu(nano_in):
    """In the file's own dtype, weights lie in memory as they lie in the file: nothing was copied."""
    file = nano_in("original").gemma2
    encoder = load_gemma2(file, device=CPU, dtype=torch.float16)
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    starts = {
        parameter.data_ptr() - header[name]["data_offsets"][0]
        for name, parameter in encoder.named_parameters()
    }
    assert len(starts) == 1


def test_prompts_come_back_in_order_and_cut(nano_in):
    file = nano_in("original").gemma2
    encoder = load_gemma2(file, device=CPU, dtype=torch.float32)
    tokenizer = load_gemma2_tokenizer(file)
    texts = ["a cat", "", "a portrait photograph of a woman " * 9, "a dog", "x" * 90]
    conditions = encode_prompts(encoder, tokenizer, texts, max_length=20, batch_size=2)
    for text, condition in zip(texts, conditions, strict=True):
        (alone,) = encoder.encode([tokenizer.ids(text, 20)])
        assert len(alone) <= 20
        torch.testing.assert_close(condition.tokens_LD, alone, rtol=1e-5, atol=2e-5)
    assert [len(c.tokens_LD) == 20 for c in conditions] == [False, False, True, False, True]


def test_no_prompts_give_no_conditions(nano_in):
    file = nano_in("original").gemma2
    encoder = load_gemma2(file, device=CPU, dtype=torch.float32)
    assert encode_prompts(encoder, load_gemma2_tokenizer(file), [], 256) == []


def test_overflow_names_the_prompt(nano_in, tmp_path):
    weights = load_file(nano_in("diffusers").gemma2 / "model.safetensors")
    weights["layers.1.post_attention_layernorm.weight"] += 1e38
    save_file(weights, tmp_path / "gemma2.safetensors")
    encoder = load_gemma2(tmp_path / "gemma2.safetensors", device=CPU, dtype=torch.float16)
    tokenizer = load_gemma2_tokenizer(nano_in("original").gemma2)
    with pytest.raises(NonFiniteError, match="a very special cat.*bf16"):
        encode_prompts(encoder, tokenizer, ["a very special cat"], 256)


def test_another_model_is_refused(nano_in):
    with pytest.raises(CheckpointError, match="autoencoder"):
        load_gemma2(nano_in("original").ae, device=CPU, dtype=torch.float32)
