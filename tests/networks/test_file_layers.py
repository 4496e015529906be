"""LoRAs with the names of other tools: made by peft and diffusers themselves, and read as kohya's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from diffusers import Lumina2Transformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lumina2_lora_to_diffusers
from safetensors.torch import save_file
from torch import Tensor, nn

from library.core.errors import CheckpointError
from networks.files import inspect_lora
from networks.from_file import create_network_from_file
from networks.lora import LoRANetwork
from networks.lora_lumina import create_network
from networks.request import NetworkRequest

Make = Callable[..., nn.Module]
PART_WIDTHS = (12, 4, 4)


def trained(model: nn.Module, randomise: Callable, **args: str) -> LoRANetwork:
    network = create_network(model, NetworkRequest(dim=4, alpha=3, args={"embedder_dims": "[1,2,3]", **args}))
    randomise(network)
    return network


def outputs(model: nn.Module, inputs: tuple[Tensor, ...], network: LoRANetwork) -> Tensor:
    network.apply_to(model)
    made = model(*inputs)
    network.remove()
    return made


def test_original_names_with_alphas_are_read_exactly(
    lumina_like: Make, randomise: Callable, tmp_path: Path
) -> None:
    network = trained(lumina_like(), randomise)
    state = {}
    for name, lora in network.loras.items():
        module = f"diffusion_model.{network.paths[name]}"
        state |= {f"{module}.lora_A.weight": lora.down.data, f"{module}.lora_B.weight": lora.up.data}
        state[f"{module}.alpha"] = torch.tensor(3.0)
    save_file(state, tmp_path / "lora.safetensors")
    read = create_network_from_file(lumina_like(), tmp_path / "lora.safetensors")
    mine, theirs = network.export_state(), read.export_state()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())


def test_diffusers_names_of_every_layer(
    lumina_like: Make, inputs: tuple[Tensor, ...], randomise: Callable, tmp_path: Path
) -> None:
    """Blocks renamed by diffusers' own converter, whose sizes of q, k and v are put in by hand."""
    model = lumina_like()
    network = trained(model, randomise, embedder_dims="[0,0,0]", exclude_patterns="final_layer.*")
    original = {}
    for name, lora in network.loras.items():
        module = f"diffusion_model.{network.paths[name]}"
        original |= {f"{module}.lora_A.weight": lora.down.data, f"{module}.lora_B.weight": lora.up.data}
    widths = dict(zip((2304, 768), PART_WIDTHS, strict=False))

    def split(tensor: Tensor, sizes: list[int], dim: int = 0) -> tuple[Tensor, ...]:
        return tensor.split([widths[size] for size in sizes], dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "split", split)
        converted = _convert_non_diffusers_lumina2_lora_to_diffusers(original)
    converted = {key: tensor.clone() for key, tensor in converted.items()}
    assert any("attn.to_k" in key for key in converted) and any("norm1.linear" in key for key in converted)
    settings = {"transformer.r": 4, "transformer.lora_alpha": 3}
    save_file(converted, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    read = create_network_from_file(model, tmp_path / "lora.safetensors")
    assert read.loras["lora_unet_layers_0_attention_qkv"].rank == 4  # q, k and v share their `down`
    assert torch.allclose(outputs(model, inputs, read), outputs(model, inputs, network), atol=1e-5)


BLOCK = (
    *("attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.1"),
    *("final_layer.linear", "final_layer.adaLN_modulation.1", "x_embedder", "cap_embedder.1"),
)
DIFFUSERS_BLOCK = (
    *(
        "attn.to_out.0",
        "feed_forward.linear_1",
        "feed_forward.linear_2",
        "feed_forward.linear_3",
        "norm1.linear",
    ),
    *("norm_out.linear_2", "norm_out.linear_1", "x_embedder", "time_caption_embed.caption_embedder.1"),
)
NAMERS = {
    "OneTrainer": lambda path: "lora_transformer_" + path.replace(".", "_") + ".lora_{}.weight",
    "OneTrainer, dots": lambda path: f"transformer.{path}" + ".lora_{}.weight",
    "LyCORIS": lambda path: "lycoris_" + path.replace(".", "_") + ".lora_{}.weight",
    "kohya": lambda path: "lora_unet_" + path.replace(".", "_") + ".lora_{}.weight",
    "bare": lambda path: path + ".lora_{}.weight",
    "old diffusers": lambda path: f"transformer.{path}" + ".lora.{}.weight",
    "older diffusers": lambda path: f"transformer.{path}" + ".lora_linear_layer.{}.weight",
    "adapter": lambda path: f"base_model.model.{path}" + ".lora_{}.default.weight",
}


@pytest.mark.parametrize("tool", NAMERS)
@pytest.mark.parametrize("layers", ["original", "diffusers"])
def test_names_of_other_tools(
    lumina_like: Make, randomise: Callable, tmp_path: Path, tool: str, layers: str
) -> None:
    """Each tool's way of writing a layer's name, with the model's own layers and with diffusers'."""
    paths = [p if "_" in p.partition(".")[0] else f"layers.1.{p}" for p in BLOCK[:5]]
    paths = [f"layers.1.{p}" for p in BLOCK[:5]] + list(BLOCK[5:])
    theirs = [f"layers.1.{p}" for p in DIFFUSERS_BLOCK[:5]] + list(DIFFUSERS_BLOCK[5:])
    model = lumina_like()
    network = trained(model, randomise, include_patterns=f"{paths + ['layers.1.attention.qkv']}")
    names = dict(zip(paths, theirs if layers == "diffusers" else paths, strict=True))
    state, ends = {}, {"down": "down", "up": "up"}
    for name, lora in network.loras.items():
        path = network.paths[name]
        if path.endswith("qkv"):
            continue
        key = NAMERS[tool](names[path])
        state |= {key.format(ends["down"]): lora.down.data, key.format(ends["up"]): lora.up.data}
        state[key.partition(".lora")[0] + ".alpha"] = torch.tensor(3.0)
    qkv = network.loras["lora_unet_layers_1_attention_qkv"]
    attention = (
        "layers.1.attn" if layers == "diffusers" else "layers.1.attention"
    )  # the latter as for Z-Image
    for part, rows in zip("qkv", qkv.up.data.split(PART_WIDTHS), strict=True):
        key = NAMERS[tool](f"{attention}.to_{part}")
        state |= {key.format("down"): qkv.down.data.clone(), key.format("up"): rows.clone()}
        state[key.partition(".lora")[0] + ".alpha"] = torch.tensor(3.0)
    save_file(state, tmp_path / "lora.safetensors")
    read = create_network_from_file(lumina_like(), tmp_path / "lora.safetensors")
    assert read.loras.keys() == network.loras.keys()
    for name, lora in network.loras.items():
        weight = model.get_submodule(network.paths[name]).weight
        assert torch.allclose(read.loras[name].delta(weight), lora.delta(weight), atol=1e-5), name


def tiny_diffusers_model() -> Lumina2Transformer2DModel:
    torch.manual_seed(0)
    return Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(16, 16, 16),
        cap_feat_dim=8,
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_saved_by_peft_merges_to_the_same_weights(rslora: bool, tmp_path: Path) -> None:
    """Every linear layer of diffusers' model, ranks and alphas by pattern, saved by peft as a folder."""
    model = tiny_diffusers_model()
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in targets if not name.startswith("noise_refiner.0.attn.to_k")]  # q and v only
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=targets,
        rank_pattern={"to_q": 2},
        alpha_pattern={"to_v": 7, "layers.0.feed_forward.linear_1": 2},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path)
    deltas = {
        name: module.get_delta_weight("default").detach()
        for name, module in adapted.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert len(deltas) == len(targets)
    file = inspect_lora(tmp_path)
    state = file.read()
    ours = {}
    for name in file.ranks:
        down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
        assert len(down) == file.ranks[name]
        ours[name] = state[f"{name}.alpha"] / len(down) * (up @ down)
    block = "lora_unet_noise_refiner_0_attention_qkv"
    missing = torch.zeros(12, 24)
    for place, (module, fused) in {
        "layers.0": ("layers.0", "lora_unet_layers_0_attention_qkv"),
        "noise": ("noise_refiner.0", block),
    }.items():
        parts = [deltas.pop(f"{module}.attn.to_{part}", missing) for part in "qkv"]
        assert torch.allclose(ours.pop(fused), torch.cat(parts), atol=1e-5), place
    ours.pop("lora_unet_context_refiner_0_attention_qkv")
    pairs = {
        "lora_unet_x_embedder": "x_embedder",
        "lora_unet_t_embedder_mlp_0": "time_caption_embed.timestep_embedder.linear_1",
        "lora_unet_t_embedder_mlp_2": "time_caption_embed.timestep_embedder.linear_2",
        "lora_unet_cap_embedder_1": "time_caption_embed.caption_embedder.1",
        "lora_unet_final_layer_adaLN_modulation_1": "norm_out.linear_1",
        "lora_unet_final_layer_linear": "norm_out.linear_2",
        "lora_unet_layers_0_attention_out": "layers.0.attn.to_out.0",
        "lora_unet_layers_0_feed_forward_w1": "layers.0.feed_forward.linear_1",
        "lora_unet_layers_0_feed_forward_w2": "layers.0.feed_forward.linear_2",
        "lora_unet_layers_0_feed_forward_w3": "layers.0.feed_forward.linear_3",
        "lora_unet_layers_0_adaLN_modulation_1": "layers.0.norm1.linear",
        "lora_unet_context_refiner_0_attention_out": "context_refiner.0.attn.to_out.0",
    }
    for kohya, theirs in pairs.items():
        assert torch.allclose(ours[kohya], deltas[theirs], atol=1e-5), kohya


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["layers.0.attn.to_q.lora_A.weight"], "not complete: 'transformer.layers.0.attn.to_q'"),
        (
            ["layers.0.attn.to_q.lora_A.weight", "layers.0.attn.to_q.lora_B.weight"],
            "beside '.*to_q.lora_A.weight' there must be",
        ),
        (
            [f"x_embedder.lora_{part}" for part in ("A.weight", "B.weight", "B.bias")],
            "1 tensors that are no part of a LoRA: transformer.x_embedder.lora_B.bias",
        ),
        (
            [f"layers.0.{m}.lora_{s}.weight" for m in ("attention.qkv", "attn.to_q") for s in "AB"],
            "more than one LoRA for the layer",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, keys: list[str], message: str) -> None:
    save_file({f"transformer.{key}": torch.zeros(4, 4) for key in keys}, tmp_path / "some.safetensors")
    with pytest.raises(CheckpointError, match=f"some.safetensors.*{message}"):
        inspect_lora(tmp_path / "some.safetensors")


@pytest.mark.parametrize("converted", [False, True])
def test_what_started_from_the_weights_must_be_converted(tmp_path: Path, converted: bool) -> None:
    """peft keeps the rest of the weights in the model itself, so the adapter alone is not for the model."""
    torch.manual_seed(0)
    linear = nn.ModuleDict({"x_embedder": nn.Linear(12, 12)})
    before = linear["x_embedder"].weight.clone()
    config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=["x_embedder"], init_lora_weights="pissa")
    adapted = peft.get_peft_model(linear, config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = "pissa"
    layer = adapted.base_model.model["x_embedder"]
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(torch.randn(12, 3))
    trained = layer.base_layer.weight + layer.get_delta_weight("default")
    start = {"path_initial_model_for_weight_conversion": tmp_path / "start"} if converted else {}
    adapted.save_pretrained(tmp_path / "saved", **start)
    if not converted:
        with pytest.raises(CheckpointError, match="init_lora_weights=pissa: it is for what peft left"):
            inspect_lora(tmp_path / "saved")
        return
    state = inspect_lora(tmp_path / "saved").read()
    down, up = (state[f"lora_unet_x_embedder.lora_{side}.weight"] for side in ("down", "up"))
    delta = state["lora_unet_x_embedder.alpha"] / len(down) * up @ down
    assert torch.allclose(before + delta, trained, atol=1e-4)


def test_unreadable_settings_are_named(tmp_path: Path) -> None:
    state = {f"x_embedder.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    save_file(state, tmp_path / "lora.safetensors", {"lora_adapter_metadata": "{"})
    with pytest.raises(CheckpointError, match="settings cannot be read"):
        inspect_lora(tmp_path / "lora.safetensors")
