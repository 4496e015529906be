"""The tables of layers: they name every layer of the models, each once, and tell whose a file is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.core.errors import CheckpointError, ConfigError
from library.models.kandinsky5_format import Kandinsky5Params
from library.models.kandinsky5_format import linear_layers as kandinsky5_layers
from library.models.lumina2_format import NextDiTParams, diffusers_names
from library.models.lumina2_format import linear_layers as lumina_layers
from library.options.network import NetworkOptions
from library.options.saving import SavingOptions
from networks.families.family import Family, Place
from networks.families.kandinsky5 import KANDINSKY5
from networks.families.known import FAMILIES, family_of, place_in_file
from networks.families.lumina import LUMINA
from networks.files import inspect_lora
from networks.module import check_layers, check_network, check_saving
from networks.names import kohya_name

LAYERS = {LUMINA: lumina_layers(NextDiTParams()), KANDINSKY5: kandinsky5_layers(Kandinsky5Params())}
LORA = {LUMINA: "networks.lora_lumina", KANDINSKY5: "networks.lora_kandinsky5"}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_layer_is_found_by_each_of_its_names_and_no_two_share_one(family: Family) -> None:
    layers = LAYERS[family]
    of_block = {path for path in family.layers if "*" in path}
    assert {path for path in family.layers if path not in of_block} <= set(layers)
    seen: dict[str, str] = {}
    for path in layers:
        assert family.path_of(kohya_name(path)) == path
        assert family.place(path) == Place(path)
        names = family.diffusers_names(path)
        parts = [None] if len(names) == 1 else [0, 1, 2]
        for name, part in zip(names, parts, strict=True):
            assert family.place(name) == family.place(name.replace(".", "_")) == Place(path, part)
            assert seen.setdefault(name.replace(".", "_"), path) == path
    assert family_of(layers) is family and family_of(map(kohya_name, layers)) is family


def test_names_in_diffusers_are_those_of_the_loader() -> None:
    for path in LAYERS[LUMINA]:
        theirs = [name.removesuffix(".weight") for name in diffusers_names(f"{path}.weight")]
        assert list(LUMINA.diffusers_names(path)) == theirs


def test_a_name_of_no_layer_is_of_no_family() -> None:
    for name in (
        "layers.0.attention",
        "visual_transformer_blocks.0.cross_attention.to_k",
        "blocks.0.attn.qkv",
    ):
        assert family_of([name]) is None
    assert place_in_file("transformer.blocks.0.attn.qkv") == Place("lora_unet_blocks_0_attn_qkv")


def options(family: Family, *args: str, module: str | None = None, **changes: object) -> NetworkOptions:
    return NetworkOptions(network_module=module or LORA[family], network_args=args, **changes)


def lora_file(path: Path, family: Family, ending: str = ".lora_{}.weight") -> Path:
    layer = list(LAYERS[family])[-3]
    save_file({layer + ending.format(side): torch.zeros(4, 4) for side in "AB"}, path)
    return path


@pytest.mark.parametrize(("family", "other"), [(LUMINA, KANDINSKY5), (KANDINSKY5, LUMINA)])
def test_the_wrong_module_and_the_wrong_file_are_told_before_torch(
    family: Family, other: Family, tmp_path: Path
) -> None:
    check_layers(options(family), LAYERS[family])
    with pytest.raises(ConfigError, match=f"{LORA[other]} is for {other.name}, but .* {LORA[family]}"):
        check_layers(options(other), LAYERS[family])
    path = lora_file(tmp_path / "a.safetensors", other)
    for module in (None, "lycoris.kohya"):
        chosen = options(family, module=module, base_weights=(path,))
        with pytest.raises(CheckpointError, match=f"a LoRA for {other.name}, but the model is {family.name}"):
            check_layers(chosen, LAYERS[family])
    save_file({f"{list(LAYERS[other])[-3]}.diff": torch.zeros(4, 4)}, path)
    with pytest.raises(CheckpointError, match=f"a LoRA for {other.name}"):
        check_layers(options(family, base_weights=(path,)), LAYERS[family])


@pytest.mark.parametrize(
    "changes",
    [
        {"network_train_text_encoder": True},
        {"network_train_text_encoder_only": True},
        {"text_encoder_lr": (1e-4,)},
    ],
)
def test_kandinskys_text_encoders_are_not_trained(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="no LoRAs here: Qwen2.5-VL .*leave out .*--text_encoder_lr"):
        check_network(options(KANDINSKY5, **changes))
    with pytest.raises(ConfigError, match="no LoRAs here"):
        check_layers(options(KANDINSKY5, module="lycoris.kohya", **changes), LAYERS[KANDINSKY5])
    check_layers(options(LUMINA, module="lycoris.kohya", **changes), LAYERS[LUMINA])


def test_a_part_for_a_text_encoder_would_be_lost(tmp_path: Path) -> None:
    path = lora_file(tmp_path / "a.safetensors", KANDINSKY5)
    save_file({f"lora_te_x.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}, path)
    assert inspect_lora(path).has_text_encoder
    with pytest.raises(CheckpointError, match="a part for a text encoder, but the text encoders of Kand"):
        check_layers(options(KANDINSKY5, base_weights=(path,)), LAYERS[KANDINSKY5])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("split_qkv=True", "layers of their own here"),
        ("attn_dim=4", "write self_attn_dim and cross_attn_dim"),
        ("mlp_dim=4", "write ff_dim"),
        ("embedder_dims=[1,2,3]", r"\[visual,text,pooled,time\] with 4"),
        ("train_blocks=transformer", "one of all, visual, text"),
        ("text_dims=4", "did you mean 'text_dim'"),
        ("block_dims=4,4", "block_dims has 2 values, but the model has 50 blocks in 'visual_tra"),
        ("include_patterns=visual", "'visual' matches no layer"),
    ],
)
def test_arguments_that_cannot_be(args: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_network(options(KANDINSKY5, args))
        check_layers(options(KANDINSKY5, args), LAYERS[KANDINSKY5])


@pytest.mark.parametrize(
    ("args", "changes", "message"),
    [
        ((), {"module": "lycoris.kohya"}, "diffusers has no names for what .*lycoris.kohya trains"),
        ((), {"network_train_text_encoder": True}, "no LoRAs for the text encoder"),
        (("dora_wd=True",), {}, "a length for each output feature .*kohya's names"),
    ],
)
def test_what_diffusers_has_no_names_for_is_told_at_the_start(
    args: tuple[str, ...], changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    saving = SavingOptions(output_dir=tmp_path, save_format="diffusers")
    with pytest.raises(ConfigError, match=message):
        check_saving(options(LUMINA, *args, **changes), saving)
    check_saving(options(LUMINA, *args, **changes), SavingOptions(output_dir=tmp_path))
    check_saving(options(LUMINA, "dora_wd=True", "wd_on_output=True"), saving)
    with pytest.raises(ConfigError, match="--save_format diffusers needs --save_model_as safetensors"):
        SavingOptions(output_dir=tmp_path, save_format="diffusers", save_model_as="ckpt")


def test_the_kind_of_a_continued_file_counts_too(tmp_path: Path) -> None:
    path, layer = tmp_path / "a.safetensors", list(LAYERS[LUMINA])[-3]
    tensors = {f"{layer}.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    save_file(tensors | {f"{layer}.dora_scale": torch.zeros(1, 4)}, path)
    chosen = options(LUMINA, network_weights=path, dim_from_weights=True)
    saving = SavingOptions(output_dir=tmp_path, save_format="diffusers")
    with pytest.raises(ConfigError, match="a length for each output feature"):
        check_saving(chosen, saving)
    others = {f"{list(LAYERS[LUMINA])[-4]}.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    save_file(tensors | others | {f"{layer}.dora_scale": torch.zeros(4, 1)}, path)
    with pytest.raises(ConfigError, match="a.safetensors has LoRAs and DoRAs"):
        check_saving(chosen, saving)
