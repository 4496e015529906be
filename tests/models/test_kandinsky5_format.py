"""Transformer files: what is read, which sizes and which task, and what is said about the others."""

import json

import pytest
import torch
from safetensors.torch import save_file

from library.core.errors import CheckpointError
from library.models.kandinsky5_format import (
    Kandinsky5Params,
    inspect_kandinsky5,
    linear_layers,
    parameter_shapes,
    quantisable_layers,
    settings_of,
)
from tests.models.kandinsky5_pairs import make_params, make_theirs

TASKS = {"t2i": 16, "i2i": 33}
LORA = "visual_transformer_blocks.0.self_attention.to_query.lora_A.weight"
FOREIGN = {
    "cap_embedder.0.weight": "a Lumina Image 2.0 transformer",
    "decoder.conv_in.weight": "an image autoencoder of the FLUX kind",
    "model.layers.0.pre_feedforward_layernorm.weight": "a Gemma2 text encoder",
    "double_blocks.0.img_attn.qkv.weight": "a FLUX transformer",
    LORA: "a LoRA",
    f"base_model.model.{LORA.replace('lora_A', 'lora_A.default')}": "a LoRA",
    "lora_unet_visual_transformer_blocks_0_feed_forward_in_layer.lora_down.weight": "a LoRA",
    "something.else": "nothing that is known here (its first tensors: something.else)",
}


@pytest.fixture(scope="module")
def tensors():
    return {name: weight.contiguous() for name, weight in make_theirs(make_params()).state_dict().items()}


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        inspect_kandinsky5(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def written(tmp_path, tensors, metadata=None):
    save_file(tensors, tmp_path / "kandinsky.safetensors", metadata)
    return tmp_path / "kandinsky.safetensors"


@pytest.mark.parametrize(("task", "size"), [("t2i", 6_022_080_576), ("i2i", 6_022_254_656)])
def test_the_real_files(hollow_file, tmp_path, task, size):
    shapes = dict(parameter_shapes(Kandinsky5Params(in_channels=TASKS[task])))
    assert len(shapes) == 1246
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == size
    found = inspect_kandinsky5(hollow_file(tmp_path / "kandinsky5lite.safetensors", shapes))
    assert found.params == Kandinsky5Params(in_channels=TASKS[task])
    assert found.params.task == task and found.params.n_blocks == 52 and found.params.n_heads == 20
    assert len(quantisable_layers(found.params)) == 512
    assert len(linear_layers(found.params)) == 512 + 53 + 6


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_prefixes(tensors, tmp_path, prefix):
    path = written(tmp_path, {prefix + name: weight for name, weight in tensors.items()})
    found = inspect_kandinsky5(path)
    assert found.params == make_params() and found.quant.scheme is None
    assert found.sources == {name: (name,) for name in tensors}
    assert found.checkpoint.tensors.keys() == tensors.keys()


@pytest.mark.parametrize("channels", TASKS.values(), ids=TASKS)
def test_diffusers_folders_and_shards(tmp_path, channels):
    params = make_params(in_channels=channels, axes_dims=(16, 8, 8), n_text_blocks=1)
    folder = tmp_path / "transformer"
    make_theirs(params).save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1
    for path in (folder, tmp_path, folder / "diffusion_pytorch_model.safetensors.index.json"):
        assert inspect_kandinsky5(path).params == params
    said = refusal(min(folder.glob("*-of-*.safetensors")))
    assert "incomplete Kandinsky 5 image transformer" in said
    assert "It is one shard of several: name their folder or the index." in said


def test_sizes_are_free(hollow_file, tmp_path):
    params = Kandinsky5Params(
        model_dim=60, ff_dim=100, n_text_blocks=1, n_visual_blocks=11, head_dim=20, text_dim=30,
        pooled_dim=7, time_dim=9, in_channels=9, latent_channels=4, axes_dims=(8, 6, 6),
    )  # fmt: skip
    path = hollow_file(tmp_path / "odd.safetensors", dict(parameter_shapes(params)))
    assert inspect_kandinsky5(path).params == params


@pytest.mark.parametrize(("name", "kind"), FOREIGN.items())
def test_another_file_is_named(tmp_path, name, kind):
    path = written(tmp_path, {name: torch.zeros(2, 2)})
    assert f"is not a Kandinsky 5 image transformer: it looks like {kind}" in refusal(path)


@pytest.mark.parametrize(("width", "name"), [(1792, "Video Lite"), (4096, "Video Pro")])
def test_a_model_for_videos_is_named(hollow_file, tmp_path, width, name):
    params = Kandinsky5Params(model_dim=width, n_visual_blocks=1, head_dim=64, axes_dims=(16, 24, 24))
    path = hollow_file(tmp_path / "video.safetensors", dict(parameter_shapes(params)))
    assert f"is Kandinsky 5 {name}, a transformer for videos" in refusal(path)


def test_missing_extra_and_misshapen_tensors_are_named(tensors, tmp_path):
    name = "visual_transformer_blocks.2.cross_attention.to_key.bias"
    without = {key: weight for key, weight in tensors.items() if key != name}
    assert f"1 of {len(tensors)} tensors are missing ({name}" in refusal(written(tmp_path, without))
    extra = tensors | {"text_transformer_blocks.0.cross_attention.to_key.bias": torch.zeros(64)}
    assert "text_transformer_blocks.0.cross_attention.to_key.bias" in refusal(written(tmp_path, extra))
    path = written(tmp_path, tensors | {name: torch.zeros(7)})
    assert f"'{name}' has shape (7,), but this" in refusal(path)
    gap = {key: weight for key, weight in tensors.items() if "visual_transformer_blocks.1." not in key}
    assert "visual_transformer_blocks.1." in refusal(written(tmp_path, gap))


@pytest.mark.parametrize(
    "name",
    [
        "visual_embeddings.in_layer.weight",
        "visual_transformer_blocks.0.self_attention.query_norm.weight",
        "visual_transformer_blocks.0.feed_forward.in_layer.weight",
        "out_layer.out_layer.weight",
    ],
)
def test_a_tensor_that_tells_a_size_is_named_too(tensors, tmp_path, name):
    without = {key: weight for key, weight in tensors.items() if key != name}
    assert f"incomplete Kandinsky 5 image transformer: it lacks '{name}'" in refusal(
        written(tmp_path, without)
    )
    path = written(tmp_path, tensors | {name: torch.zeros(())})
    assert f"'{name}' has the impossible shape ()" in refusal(path)


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        (
            "visual_embeddings.in_layer.weight",
            (64, 4 * 17),
            "image-to-image: 17 channels in, 16 channels out",
        ),
        ("visual_embeddings.in_layer.weight", (64, 65), "16.25 channels in"),
        ("visual_embeddings.in_layer.weight", (70, 64), "70 cannot be divided into heads of 32"),
    ],
)
def test_widths_that_do_not_fit(tensors, tmp_path, name, shape, sentence):
    assert sentence in refusal(written(tmp_path, tensors | {name: torch.zeros(shape)}))


def test_truncated_and_missing_files(tensors, tmp_path):
    path = written(tmp_path, tensors)
    path.write_bytes(path.read_bytes()[:100_000])
    assert "truncated" in refusal(path)
    assert "There is no weight file" in refusal(tmp_path / "nothing.safetensors")


class TestSettings:
    """What shapes cannot tell."""

    def test_metadata_as_we_write_it(self, tensors, tmp_path):
        params = make_params(axes_dims=(16, 8, 8))
        assert inspect_kandinsky5(written(tmp_path, tensors, settings_of(params))).params == params

    def test_a_config_json_of_something_else_is_not_believed(self, tensors, tmp_path):
        path = written(tmp_path, tensors)
        config = {"axes_dims": [16, 8, 8], "_class_name": "Lumina2Transformer2DModel"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert inspect_kandinsky5(path).params.axes_dims == (8, 12, 12)

    @pytest.mark.parametrize(
        ("metadata", "sentence"),
        [
            ({"axes_dims": "[8, 12, 10]"}, "[8, 12, 10] must be even and add up to 32"),
            ({"axes_dims": "[8, 24]"}, "must be 3 whole numbers"),
            ({"patch_size": "[2, 2, 2]"}, "patch_size is [2, 2, 2], but must be [1, n, n]"),
            ({"patch_size": "[1, 1, 1]"}, "image-to-image: 64 channels in, 64 channels out"),
        ],
    )
    def test_impossible_ones(self, tensors, tmp_path, metadata, sentence):
        tensors = dict(tensors)
        if metadata.get("patch_size") == "[1, 1, 1]":  # 64 in and out are a model of its own; 64 and 60 not
            tensors["out_layer.out_layer.weight"] = torch.zeros(60, 64)
            sentence = "image-to-image: 64 channels in, 60 channels out"
        assert sentence in refusal(written(tmp_path, tensors, metadata))
