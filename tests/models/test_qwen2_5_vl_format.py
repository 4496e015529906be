"""Qwen2.5-VL files: what is accepted, and what is said about the others."""

import json
import math
from dataclasses import replace

import pytest

from library.core.errors import CheckpointError
from library.models.qwen2_5_vl_format import (
    Qwen2_5_VLParams,
    VisionParams,
    inspect_qwen2_5_vl,
    parameter_shapes,
    quantisable_layers,
)
from tools.nano.kandinsky5_qwen import PARAMS, qwen_config

RELEASED = Qwen2_5_VLParams(vision=VisionParams())


def shapes_of(params, *, language="model.", head=True):
    """Return the tensors as the released folders name them."""
    names = {n.replace("language_model.", language, 1): s for n, s in parameter_shapes(params)}
    return names | ({"lm_head.weight": (params.vocab, params.hidden)} if head else {})


@pytest.fixture
def nano_file(hollow_file, tmp_path):
    """Return a function that writes the nano model's names, changed, with a config.json, changed too."""

    def write(more=None, *, without=(), config=None):
        shapes = {n: s for n, s in shapes_of(PARAMS).items() if not n.startswith(without or ("-",))}
        (tmp_path / "config.json").write_text(json.dumps(qwen_config() | (config or {})))
        return hollow_file(tmp_path / "q.safetensors", shapes | (more or {}))

    return write


def refusal(path, *, vision=True):
    with pytest.raises(CheckpointError) as caught:
        inspect_qwen2_5_vl(path, vision=vision)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize(
    ("language", "tower"),
    [("model.", "visual."), ("model.language_model.", "model.visual."), ("language_model.", "visual.")],
)
def test_the_real_file(hollow_file, tmp_path, language, tower, vision):
    shapes = {n.replace("visual.", tower, 1): s for n, s in shapes_of(RELEASED, language=language).items()}
    assert len(shapes) == 729
    assert sum(map(math.prod, shapes.values())) == 8_292_166_656
    found = inspect_qwen2_5_vl(hollow_file(tmp_path / "q.safetensors", shapes), vision=vision)
    assert found.params == (RELEASED if vision else replace(RELEASED, vision=None))
    assert len(found.checkpoint.tensors) == (728 if vision else 338)


def test_the_text_model_alone_has_no_prefix(hollow_file, tmp_path):
    shapes = shapes_of(replace(RELEASED, vision=None), language="", head=False)
    path = hollow_file(tmp_path / "q.safetensors", shapes)
    assert inspect_qwen2_5_vl(path, vision=False).params == replace(RELEASED, vision=None)
    assert "no vision tower" in refusal(path)


def test_the_smaller_release_is_told_from_its_width(hollow_file, tmp_path):
    """The 3B has heads as wide as the 7B's, and 36 layers."""
    small = replace(RELEASED, vocab=151936, hidden=2048, layers=36, heads=16, kv_heads=2, ffn_dim=11008)
    path = hollow_file(tmp_path / "q.safetensors", shapes_of(small))
    assert inspect_qwen2_5_vl(path, vision=True).params == small


def test_a_released_width_with_fewer_layers_is_incomplete(hollow_file, tmp_path):
    cut = {n: s for n, s in shapes_of(RELEASED).items() if not n.startswith("model.layers.27.")}
    message = refusal(hollow_file(tmp_path / "q.safetensors", cut), vision=False)
    assert "12 of 338 tensors are missing" in message and "layers.27." in message


def nested(config):
    """The config.json as transformers 5 writes it."""
    text = {k: v for k, v in config.items() if k not in ("model_type", "vision_config", "image_token_id")}
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta"), **text.pop("rope_scaling")}
    rope.pop("type")
    text |= {"model_type": "qwen2_5_vl_text", "rope_parameters": rope}
    return {k: v for k, v in config.items() if k not in text or k == "model_type"} | {"text_config": text}


@pytest.mark.parametrize("place", ["beside", "in the metadata"])
@pytest.mark.parametrize("form", [lambda config: config, nested], ids=["flat", "nested"])
def test_what_shapes_do_not_tell_is_in_the_config(tmp_path, form, place):
    import torch
    from safetensors.torch import save_file

    params = replace(PARAMS, rope_theta=5e5, rms_norm_eps=1e-5, vision=replace(PARAMS.vision, window=56))
    config = json.dumps(form(qwen_config(params)))
    tensors = {name: torch.zeros(shape, dtype=torch.int8) for name, shape in shapes_of(params).items()}
    path = tmp_path / "q.safetensors"
    save_file(tensors, path, {} if place == "beside" else {"config": config})
    if place == "beside":
        assert "how many heads a width of 64 has" in refusal(path)
        (tmp_path / "config.json").write_text(config)
    assert inspect_qwen2_5_vl(path, vision=True).params == params


def test_a_pipeline_folder(nano_file, tmp_path):
    (tmp_path / "pipeline" / "text_encoder").mkdir(parents=True)
    for file in (nano_file(), tmp_path / "config.json"):
        file.rename(tmp_path / "pipeline" / "text_encoder" / file.name)
    assert inspect_qwen2_5_vl(tmp_path / "pipeline", vision=True).params == PARAMS


@pytest.mark.parametrize(
    ("more", "without", "words"),
    [
        ({}, ("model.layers.1.mlp.up_proj.",), "1 of 68 tensors are missing (language_model.layers.1.mlp.up"),
        (
            {},
            ("visual.blocks.0.norm1.", "visual.merger.ln_q."),
            "2 of 68 tensors are missing (visual.blocks.0",
        ),
        ({}, ("visual.merger.mlp.0.",), "incomplete Qwen2.5-VL text encoder"),
        ({}, ("visual.",), "no vision tower"),
        ({}, ("model.embed_tokens.",), "incomplete Qwen2.5-VL text encoder"),
        ({"model.layers.0.mlp.router.weight": (4, 4)}, (), "1 tensors that do not belong"),
        ({"visual.blocks.0.extra": (4,)}, (), "visual.blocks.0.extra"),
        ({"model.layers.2.mlp.down_proj.weight": (64, 100)}, (), "has shape (64, 100), but"),
        ({"visual.patch_embed.proj.weight": (32, 1176)}, (), "five sizes are needed"),
        (
            {"model.layers.0.self_attn.q_proj.scale_weight": (1,)},
            (),
            "Only weights in fp8 with one",
        ),
        ({"model.layers.0.mlp.up_proj.weight_scale_inv": (1, 1)}, (), "ComfyUI's qwen_2.5_vl_7b.safetensors"),
        ({"model.layers.0.mlp.up_proj.weight.absmax": (9,)}, (), "bitsandbytes"),
        ({"visual.blocks.0.mlp.fc1.weight": (9, 9)}, ("visual.",), "it looks like a Qwen2-VL"),
    ],
)
def test_what_is_wrong_is_said(nano_file, more, without, words):
    assert words in refusal(nano_file(more, without=without))


def test_without_vision_its_tower_is_not_looked_at(nano_file):
    path = nano_file({"visual.blocks.0.extra": (4,)}, without=("visual.blocks.1.",))
    assert inspect_qwen2_5_vl(path, vision=False).params == replace(PARAMS, vision=None)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_attention_heads": 5}, "how many heads a width of 64 has"),
        ({"num_attention_heads": 1}, "keys of 32 rows do not divide into heads of 64"),
        ({"rope_scaling": {"mrope_section": [1, 2, 3]}}, "mrope_section [1, 2, 3] does not fit"),
        ({"rope_scaling": {"type": "yarn"}}, "type is 'yarn'; only 'default'"),
        ({"use_sliding_window": True}, "use_sliding_window is True; only False"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers is 'many', but must be a positive number"),
        ({"num_hidden_layers": 4}, "12 of 80 tensors are missing"),
        (
            {"vision_config": {"num_heads": 2, "fullatt_block_indexes": [7]}},
            "a vision tower of 2 blocks has no block 7",
        ),
        ({"vision_config": {"fullatt_block_indexes": 1}}, "must be a list of whole numbers"),
        ({"vision_config": {"num_heads": 5}}, "does not divide into 5 heads"),
        ({"model_type": "qwen2"}, "says that it is Qwen2 or Qwen2.5 without vision"),
    ],
)
def test_a_config_that_does_not_fit(nano_file, config, words):
    assert words in refusal(nano_file(config=config))


def test_fewer_and_wider_heads_of_the_config_are_taken(nano_file):
    path = nano_file(config={"num_attention_heads": 2, "rope_scaling": {"mrope_section": [4, 6, 6]}})
    params = inspect_qwen2_5_vl(path, vision=False).params
    assert (params.heads, params.kv_heads, params.head_dim) == (2, 1, 32)


def test_the_config_of_another_model_is_not_believed(hollow_file, tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 2}'
    )
    path = hollow_file(tmp_path / "q.safetensors", shapes_of(RELEASED))
    assert inspect_qwen2_5_vl(path, vision=True).params == RELEASED


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["layers.0.self_attn.q_norm.weight", "layers.0.mlp.gate_proj.weight"], "such as Gemma3 or Qwen3"),
        (["model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.q_proj.weight"], "language model"),
        (["text_model.encoder.layers.0.self_attn.q_proj.bias"], "a CLIP text encoder"),
        (["visual_transformer_blocks.0.x"], "a Kandinsky 5 transformer"),
    ],
)
def test_another_model_is_named(hollow_file, tmp_path, names, words):
    path = hollow_file(tmp_path / "q.safetensors", dict.fromkeys(names, (4, 4)))
    message = refusal(path)
    assert "is not a Qwen2.5-VL text encoder: it looks like" in message and words in message


def test_one_shard_and_a_truncated_file(nano_file):
    path = nano_file(without=("model.layers.0.", "model.norm."))
    shard = path.rename(path.with_name("model-00002-of-00002.safetensors"))
    assert "It is one shard of several" in refusal(shard)
    whole = nano_file()
    whole.write_bytes(whole.read_bytes()[:-1])
    assert "truncated" in refusal(whole)


def test_the_layers_that_may_be_quantised():
    layers = quantisable_layers(RELEASED)
    assert len(layers) == 7 * 28
    shapes = dict(parameter_shapes(RELEASED))
    assert sum(math.prod(shapes[f"{layer}.weight"]) for layer in layers) == 6_525_288_448
