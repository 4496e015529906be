"""Transformer files: which layouts are read, which sizes, and what is said about the others."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.core.errors import CheckpointError
from library.models.lumina2_format import NextDiTParams, inspect_lumina2, parameter_shapes

LAYOUTS = {
    "original": ("original", 1e-6),
    "comfyui": ("original", 1e-6),
    "all_in_one": ("original", 1e-6),
    "diffusers": ("diffusers", 1e-5),
    "sharded": ("diffusers", 1e-5),
}


@pytest.fixture
def tensors(nano_in):
    return load_file(nano_in("original").dit)


@pytest.fixture
def diffusers_folder(nano_in, tmp_path):
    """A copy of the diffusers folder that a test may spoil."""
    return shutil.copytree(nano_in("diffusers").dit, tmp_path / "transformer")


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        inspect_lumina2(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_the_real_file(hollow_file, tmp_path):
    shapes = dict(parameter_shapes(NextDiTParams())) | {"norm_final.weight": (2304,)}
    assert len(shapes) == 400
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 2_609_771_456
    found = inspect_lumina2(hollow_file(tmp_path / "lumina.safetensors", shapes))
    assert found.params == NextDiTParams()
    assert found.layout == "original"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised(nano_in, layout):
    found = inspect_lumina2(nano_in(layout).dit)
    kind, eps = LAYOUTS[layout]
    assert found.layout == kind
    assert found.params == NextDiTParams(
        dim=192, n_layers=4, n_noise_refiners=1, n_context_refiners=1, n_heads=4, n_kv_heads=2, head_dim=48,
        ffn_dim=768, cap_feat_dim=128, time_dim=192, axes_dims=(16, 16, 16), qk_norm_eps=eps,
    )  # fmt: skip
    assert found.sources.keys() == dict(parameter_shapes(found.params)).keys()


def test_a_pipeline_folder_is_looked_into(nano_in):
    transformer = nano_in("diffusers").dit
    assert inspect_lumina2(transformer.parent).params == inspect_lumina2(transformer).params


def test_refiners_are_counted_apart_and_sizes_are_free(hollow_file, tmp_path):
    params = NextDiTParams(
        dim=80, n_layers=3, n_noise_refiners=2, n_context_refiners=1, n_heads=5, n_kv_heads=1, head_dim=20,
        ffn_dim=100, cap_feat_dim=30, time_dim=70, time_frequencies=64, in_channels=4, axes_dims=(8, 6, 6),
    )  # fmt: skip
    path = hollow_file(tmp_path / "odd.safetensors", dict(parameter_shapes(params)))
    assert inspect_lumina2(path).params == params


@pytest.mark.parametrize(
    ("part", "kind"), [("gemma2", "a Gemma2 text encoder"), ("ae", "an image autoencoder of the FLUX kind")]
)
def test_another_model_is_named(nano_in, part, kind):
    assert f"it looks like {kind}" in refusal(getattr(nano_in("original"), part))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_layers_0_attention_qkv.lora_down.weight", "a LoRA"),
        ("visual_transformer_blocks.0.self_attention.to_query.weight", "a Kandinsky 5 transformer"),
        ("conditioner.embedders.1.model.ln_final.weight", "an SDXL model"),
        ("something.else", r"nothing that is known here \(its first tensors: something.else\)"),
    ],
)
def test_foreign_files_are_named(tmp_path, name, kind):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    assert re.search(f"it looks like {kind}", refusal(tmp_path / "x.safetensors"))


def test_a_descendant_with_the_same_names_is_told_apart(tensors, tmp_path):
    save_file(tensors | {"cap_pad_token": torch.zeros(1, 192)}, tmp_path / "z.safetensors")
    assert "it looks like a Z-Image transformer" in refusal(tmp_path / "z.safetensors")


def test_missing_extra_and_misshapen_tensors_are_named(tensors, tmp_path):
    path, name = tmp_path / "lumina.safetensors", "layers.2.feed_forward.w3.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    assert f"1 of 90 tensors are missing ({name}" in refusal(path)
    save_file(tensors | {"layers.2.feed_forward.w4.weight": torch.zeros(1)}, path)
    assert "layers.2.feed_forward.w4.weight" in refusal(path)
    save_file(tensors | {name: torch.zeros(7, 7)}, path)
    assert f"'{name}' has shape (7, 7), but this" in refusal(path)


@pytest.mark.parametrize("name", ["layers.0.attention.q_norm.weight", "x_embedder.weight"])
def test_a_tensor_that_tells_a_size_is_named_too(tensors, tmp_path, name):
    path = tmp_path / "lumina.safetensors"
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    assert f"lacks '{name}'" in refusal(path)
    save_file(tensors | {name: torch.zeros(())}, path)
    assert f"'{name}' has the impossible shape ()" in refusal(path)


def test_a_missing_block_is_named(tensors, tmp_path):
    path = tmp_path / "lumina.safetensors"
    save_file({k: v for k, v in tensors.items() if not k.startswith("layers.1.")}, path)
    assert "layers.1." in refusal(path)


def test_heads_that_do_not_add_up(tensors, tmp_path):
    path = tmp_path / "lumina.safetensors"
    save_file(tensors | {"layers.0.attention.qkv.weight": torch.zeros(300, 192)}, path)
    assert "heads of 48 features, 300 rows of queries, keys and values, 192 columns" in refusal(path)


def test_truncated_and_missing_files(nano_in, tmp_path):
    path = tmp_path / "lumina.safetensors"
    path.write_bytes(nano_in("original").dit.read_bytes()[:100_000])
    assert "truncated" in refusal(path)
    assert "There is no weight file" in refusal(tmp_path / "nothing.safetensors")


class TestSettings:
    """What shapes cannot tell."""

    def test_metadata(self, tensors, tmp_path):
        metadata = {
            "axes_dims": "[24, 12, 12]",
            "qk_norm_eps": "1e-4",
            "norm_eps": "2e-5",
            "rope_theta": "500.0",
        }
        save_file(tensors, tmp_path / "a.safetensors", metadata | {"format": "pt", "note": "trained by hand"})
        params = inspect_lumina2(tmp_path / "a.safetensors").params
        assert (params.axes_dims, params.qk_norm_eps) == ((24, 12, 12), 1e-4)
        assert (params.norm_eps, params.rope_theta) == (2e-5, 500.0)

    def test_metadata_with_a_whole_config(self, tensors, tmp_path):
        config = {"axes_dim_rope": [24, 12, 12], "patch_size": 1}
        save_file(tensors, tmp_path / "a.safetensors", {"config": json.dumps(config)})
        params = inspect_lumina2(tmp_path / "a.safetensors").params
        assert (params.axes_dims, params.patch_size, params.in_channels) == ((24, 12, 12), 1, 64)

    def test_config_json_of_diffusers(self, diffusers_folder):
        config = json.loads((diffusers_folder / "config.json").read_text())
        config |= {"axes_dim_rope": [32, 8, 8], "norm_eps": 1e-4}
        (diffusers_folder / "config.json").write_text(json.dumps(config))
        params = inspect_lumina2(diffusers_folder).params
        assert (params.axes_dims, params.norm_eps, params.qk_norm_eps) == ((32, 8, 8), 1e-4, 1e-5)

    def test_a_config_json_of_something_else_is_not_believed(self, tensors, tmp_path):
        save_file(tensors, tmp_path / "lumina.safetensors")
        (tmp_path / "config.json").write_text('{"model_type": "gemma2", "norm_eps": 0.5, "patch_size": 14}')
        assert inspect_lumina2(tmp_path / "lumina.safetensors").params.norm_eps == 1e-5

    @pytest.mark.parametrize(
        ("setting", "sentence"),
        [
            ({"axes_dims": "[16, 16, 8]"}, r"\[16, 16, 8\] must be even and add up to 48"),
            ({"axes_dims": "[15, 17, 16]"}, "must be even"),
            ({"axes_dims": "[24, 24]"}, "must be 3 whole numbers"),
            ({"norm_eps": "-1"}, "norm_eps is -1, but must be a positive number"),
            ({"patch_size": "1.5"}, "patch_size is 1.5, but must be a whole number"),
        ],
    )
    def test_settings_that_cannot_be(self, tensors, tmp_path, setting, sentence):
        save_file(tensors, tmp_path / "a.safetensors", setting)
        assert re.search(sentence, refusal(tmp_path / "a.safetensors"))
