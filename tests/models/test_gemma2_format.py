"""Text encoder files: what is accepted, and what is said about the others."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.core.errors import CheckpointError
from library.models.gemma2_format import Gemma2Params, inspect_gemma2, parameter_shapes

GEMMA2_2B = Gemma2Params(
    vocab=256000, hidden=2304, layers=26, heads=8, kv_heads=4, head_dim=256, ffn_dim=9216
)


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        inspect_gemma2(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["", "model.", "text_encoders.gemma2_2b.transformer.model."])
def test_the_real_file(hollow_file, tmp_path, prefix):
    shapes = dict(parameter_shapes(GEMMA2_2B))
    assert len(shapes) == 288
    assert sum(map(math.prod, shapes.values())) == 2_614_341_888
    found = inspect_gemma2(
        hollow_file(tmp_path / "g.safetensors", {prefix + name: s for name, s in shapes.items()})
    )
    assert found.params == GEMMA2_2B
    assert found.prefix == prefix


def test_fewer_layers_than_the_config_says_are_incomplete(hollow_file, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma2", "num_hidden_layers": 26}')
    shapes = dict(parameter_shapes(GEMMA2_2B))
    short = {n: s for n, s in shapes.items() if not n.startswith(("layers.24.", "layers.25."))}
    message = refusal(hollow_file(tmp_path / "g.safetensors", short))
    assert "22 of 288 tensors are missing" in message
    assert "layers.24." in message


def test_one_shard_is_incomplete(nano_in):
    folder = nano_in("sharded").gemma2.parent
    message = refusal(folder / "model-00002-of-00003.safetensors")
    assert "missing" in message and "shard" in message


def test_a_missing_shard_is_named(nano_in, tmp_path):
    for file in nano_in("sharded").gemma2.parent.iterdir():
        if file.name != "model-00002-of-00003.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        inspect_gemma2(tmp_path)


@pytest.mark.parametrize(("part", "kind"), [("ae", "autoencoder"), ("dit", "a Lumina Image 2.0 transformer")])
def test_another_model_is_named(nano_in, part, kind):
    assert kind in refusal(getattr(nano_in("original"), part))


def test_gemma3_is_not_taken_for_gemma2(hollow_file, tmp_path):
    shapes = dict(parameter_shapes(GEMMA2_2B)) | {"layers.0.self_attn.q_norm.weight": (256,)}
    assert "Gemma3" in refusal(hollow_file(tmp_path / "g.safetensors", shapes))


def test_an_unknown_tensor_is_named(nano_in, tmp_path):
    tensors = load_file(nano_in("original").gemma2) | {
        "model.layers.0.mlp.gate_proj.scale_weight": torch.ones(1)
    }
    save_file(tensors, tmp_path / "g.safetensors")
    assert "layers.0.mlp.gate_proj.scale_weight" in refusal(tmp_path / "g.safetensors")


def narrow_heads():
    """A Gemma2 with heads of 32, which its shapes do not tell: 96 query rows look like no whole head."""
    params = Gemma2Params(vocab=50, hidden=48, layers=2, heads=3, kv_heads=1, head_dim=32, ffn_dim=64)
    tensors = {name: torch.zeros(shape) for name, shape in parameter_shapes(params)}
    return params, tensors


def test_head_width_comes_from_config_or_metadata(tmp_path):
    params, tensors = narrow_heads()
    path = tmp_path / "g.safetensors"
    config = json.dumps({"model_type": "gemma2", "head_dim": 32, "num_hidden_layers": 2})
    save_file(tensors, path)
    assert "config.json" in refusal(path)
    save_file(tensors, path, {"config": config})
    assert inspect_gemma2(path).params == params
    save_file(tensors, path)
    (tmp_path / "config.json").write_text(config)
    assert inspect_gemma2(path).params == params


def test_a_config_may_switch_the_soft_cap_off(nano_in, tmp_path):
    for file in nano_in("diffusers").gemma2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_logit_softcapping": None}))
    assert inspect_gemma2(tmp_path).params.attn_logit_softcapping is None
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": "wide"}))
    assert "head_dim" in refusal(tmp_path)


def test_the_config_of_another_model_beside_the_file_is_not_believed(nano_in, tmp_path):
    path = tmp_path / "g.safetensors"
    path.write_bytes(nano_in("original").gemma2.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "llama", "head_dim": 64, "num_hidden_layers": 32}')
    assert inspect_gemma2(path).params == inspect_gemma2(nano_in("original").gemma2).params


def test_truncated_file(nano_in, tmp_path):
    path = tmp_path / "g.safetensors"
    path.write_bytes(nano_in("original").gemma2.read_bytes()[:-1])
    assert "truncated" in refusal(path)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; only 'gelu_pytorch_tanh'"),
        ({"attention_bias": True}, "attention_bias is True"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "only sliding_attention and full_attention",
        ),
    ],
)
def test_a_gemma2_of_another_build_is_refused(hollow_file, tmp_path, setting, words):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"} | setting))
    path = hollow_file(tmp_path / "g.safetensors", dict(parameter_shapes(GEMMA2_2B)))
    assert words in refusal(path)
