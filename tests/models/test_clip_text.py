"""CLIP's text encoder: parity with transformers, and the layouts of its files."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from library.core.errors import CheckpointError
from library.models.clip_text import load_clip_text
from library.models.clip_text_format import ClipTextParams, inspect_clip_text, parameter_shapes
from library.models.clip_tokenizer import find_clip_tokenizer
from tools.nano.files import prefixed, write_shards
from tools.nano.kandinsky5_text import (
    CLIP_PARAMS,
    CLIP_VOCAB,
    clip_config,
    clip_tensors,
    write_clip_tokenizer,
)

CPU = torch.device("cpu")
END = CLIP_VOCAB - 1
TEXTS = ["", "a cat", "A small red cat on the table; 大きな猫 😀", "a picture of a golden cup " * 40]


@pytest.fixture(scope="module")
def tensors():
    return clip_tensors(0)


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    """Token ids of texts, the last of which is cut."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_clip_tokenizer(folder)
    tokenizer = find_clip_tokenizer(folder).build()
    found = [tokenizer.ids(text) for text in TEXTS]
    assert [len(found[0]), len(found[-1])] == [2, 77]
    return found


@pytest.fixture(scope="module")
def single(tensors, tmp_path_factory):
    """The nano encoder as ComfyUI's clip_l.safetensors is."""
    file = tmp_path_factory.mktemp("clip") / "clip_l.safetensors"
    save_file(prefixed(tensors, "text_model."), file)
    return file


def official(ids, config=None, tensors=None):
    """The pooled output as the official code takes it: padded to 77 with `<|endoftext|>`."""
    model = CLIPTextModel(CLIPTextConfig(**(config or clip_config()))).eval()
    model.load_state_dict(tensors or clip_tensors(0))
    end = model.config.eos_token_id
    padded = torch.tensor([each + [end] * (77 - len(each)) for each in ids])
    mask = torch.tensor([[1] * len(each) + [0] * (77 - len(each)) for each in ids])
    with torch.no_grad():
        return model(input_ids=padded, attention_mask=mask).pooler_output


def test_pooled_output_equals_transformers(single, ids):
    encoder = load_clip_text(single, device=CPU, dtype=torch.float32)
    pooled = encoder.encode(ids)
    assert pooled.shape == (len(TEXTS), CLIP_PARAMS.hidden) and not pooled.requires_grad
    torch.testing.assert_close(pooled, official(ids), atol=2e-6, rtol=1e-5)


def test_neither_padding_nor_company_changes_it(single, ids):
    encoder = load_clip_text(single, device=CPU, dtype=torch.float32)
    alone = torch.cat([encoder.encode([each]) for each in ids])
    torch.testing.assert_close(encoder.encode(ids), alone, atol=2e-6, rtol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 0.1  # and the text does


def test_other_sizes_from_a_configuration(tmp_path):
    """Heads, activation and epsilon cannot be told from shapes; a projection stands beside."""
    params = ClipTextParams(
        vocab=60,
        hidden=32,
        layers=3,
        heads=4,
        ffn_dim=40,
        positions=80,
        activation="gelu",
        layer_norm_eps=0.1,
    )
    config, tensors = clip_config(params), clip_tensors(1, params)
    write_shards(tmp_path, "model", {**tensors, "text_projection.weight": torch.ones(8, 32)}, 3)
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = load_clip_text(tmp_path, device=CPU, dtype=torch.float32)
    assert encoder.params == params
    ids = [[58, *range(20), 59], [58, 59]]
    torch.testing.assert_close(encoder.encode(ids), official(ids, config, tensors), atol=2e-6, rtol=1e-5)


def test_dtypes(single, ids):
    whole = load_clip_text(single, device=CPU, dtype=torch.float32).encode(ids)
    encoder = load_clip_text(single, device=CPU, dtype=torch.bfloat16)
    pooled = encoder.encode(ids)
    assert pooled.dtype == encoder.dtype == torch.bfloat16 and encoder.device == CPU
    assert 0 < (pooled.float() - whole).norm() / whole.norm() < 0.03


def whole_clip(tensors):
    """What the released folder holds: both towers, and the projections."""
    text = clip_config() | {"projection_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 28, "patch_size": 14}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    names = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    assert not model.load_state_dict(names, strict=False).unexpected_keys
    return model


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [
        ("", {}),
        ("text_model.", {"text_model.embeddings.position_ids": torch.arange(77)[None]}),
        ("text_model.", {"text_projection.weight": torch.eye(4), "logit_scale": torch.ones(())}),
        ("cond_stage_model.transformer.text_model.", {"model.diffusion_model.x": torch.ones(1)}),
        ("text_encoders.clip_l.transformer.text_model.", {"vae.decoder.conv_in.weight": torch.ones(1)}),
    ],
)
def test_layouts(tensors, tmp_path, ids, single, prefix, beside):
    file = tmp_path / "clip_l.safetensors"
    save_file({**beside, **prefixed(tensors, prefix)}, file)
    found = inspect_clip_text(file)
    assert (found.prefix, found.params) == (prefix, CLIP_PARAMS)
    wanted = load_clip_text(single, device=CPU, dtype=torch.float32).encode(ids)
    assert torch.equal(load_clip_text(found, device=CPU, dtype=torch.float32).encode(ids), wanted)


def test_folders_written_by_transformers(tensors, tmp_path, ids, single):
    """Of the text model alone, in a pipeline, and of the whole CLIP."""
    model = CLIPTextModel(CLIPTextConfig(**clip_config()))
    model.load_state_dict(tensors)
    model.save_pretrained(tmp_path / "pipeline" / "text_encoder_2")
    whole_clip(tensors).save_pretrained(tmp_path / "whole")
    wanted = load_clip_text(single, device=CPU, dtype=torch.float32).encode(ids)
    pipeline = tmp_path / "pipeline"
    for path in (pipeline, pipeline / "text_encoder_2", tmp_path / "whole"):
        encoder = load_clip_text(path, device=CPU, dtype=torch.float32)
        assert torch.equal(encoder.encode(ids), wanted)


def test_sizes_of_the_released_one(hollow_file, tmp_path):
    params = ClipTextParams()
    shapes = {f"text_model.{name}": shape for name, shape in parameter_shapes(params)}
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 123_060_480
    hollow_file(tmp_path / "clip_l.safetensors", shapes)
    assert inspect_clip_text(tmp_path / "clip_l.safetensors").params == params


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"encoder.layers.1.mlp.fc2.bias": None}, "incomplete CLIP text encoder: 1 of .*fc2.bias"),
        ({"encoder.layers.0.mlp.fc1.weight": None}, "incomplete CLIP text encoder"),
        ({"encoder.layers.7.mlp.fc1.weight": torch.ones(2, 2)}, "1 tensors that do not belong"),
        ({"final_layer_norm.bias": torch.ones(3)}, r"'final_layer_norm.bias' has shape \(3,\)"),
        ({"embeddings.token_embedding.weight": None}, "is not a CLIP text encoder"),
        ({"x.embeddings.token_embedding.weight": torch.ones(2, 2)}, "is not a CLIP text encoder"),
    ],
)
def test_damaged_files(tensors, tmp_path, changed, message):
    changed_tensors = {name: t for name, t in {**tensors, **changed}.items() if t is not None}
    save_file(changed_tensors, tmp_path / "clip_l.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        inspect_clip_text(tmp_path / "clip_l.safetensors")
    assert "clip_l.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; only quick_gelu and gelu"),
        ({"num_attention_heads": 7}, "width of 128 does not divide into 7 heads"),
        ({"num_attention_heads": "2"}, "num_attention_heads is '2', but must be a positive number"),
        ({"num_hidden_layers": 3}, "incomplete CLIP text encoder"),
    ],
)
def test_configurations_that_do_not_fit(tensors, tmp_path, config, message):
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(clip_config() | config))
    with pytest.raises(CheckpointError, match=message):
        inspect_clip_text(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.pre_feedforward_layernorm.weight", "a Gemma2 text encoder"),
        ("transformer.resblocks.0.attn.in_proj_weight", "a CLIP text encoder in OpenCLIP's layout"),
    ],
)
def test_other_models_are_named(tmp_path, name, kind):
    save_file({name: torch.ones(1)}, tmp_path / "g.safetensors")
    with pytest.raises(CheckpointError, match=f"layout of Hugging Face: it looks like {kind}"):
        inspect_clip_text(tmp_path / "g.safetensors")


def test_tokens_of_another_tokenizer(single):
    encoder = load_clip_text(single, device=CPU, dtype=torch.float32)
    with pytest.raises(CheckpointError, match="--clip_tokenizer"):
        encoder.encode([[0, END + 1]])
