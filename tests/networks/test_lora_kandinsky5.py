"""LoRA on Kandinsky 5.0 Image: its layers and ranks, its effect, and LyCORIS on the same layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from library.core.errors import CheckpointError, ConfigError
from library.models.kandinsky5_format import Kandinsky5Params, linear_layers
from library.options.network import NetworkOptions
from networks.families.kandinsky5 import KANDINSKY5
from networks.from_file import create_network_from_file
from networks.lora_kandinsky5 import create_network
from networks.lora_lumina import create_network as create_lumina_network
from networks.module import check_network, install_network
from networks.network_args import parse_args
from networks.request import NetworkRequest
from tests.models.kandinsky5_pairs import Inputs, Pair, make_inputs, make_pair, make_params

PATHS = linear_layers(Kandinsky5Params())
EVERYTHING = {"embedder_dims": "[4,4,4,4]", "mod_dim": "4", "network_reg_dims": r"out_layer\..*=4"}


def ranks(**args: str) -> dict[str, int]:
    """Return the ranks in the released model, of the layers that get a LoRA."""
    chosen = parse_args(KANDINSKY5.args, args, KANDINSKY5.refused)
    chosen.check_layers(PATHS)
    return {path: rank for path in PATHS if (rank := chosen.rank_of(path, 16))}


def test_default_layers_are_the_512_of_the_official_recipe() -> None:
    attention = ("to_query", "to_key", "to_value", "out_layer")
    parts = [f"self_attention.{name}" for name in attention] + [
        "feed_forward.in_layer",
        "feed_forward.out_layer",
    ]
    expected = {f"text_transformer_blocks.{n}.{part}" for n in range(2) for part in parts}
    parts += [f"cross_attention.{name}" for name in attention]
    expected |= {f"visual_transformer_blocks.{n}.{part}" for n in range(50) for part in parts}
    assert set(ranks()) == expected and len(expected) == 512


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"mod_dim": "4"}, {16: 512, 4: 52}),
        ({"mod_dim": "4", "train_blocks": "visual"}, {16: 500, 4: 50}),
        ({"train_blocks": "text"}, {16: 12}),
        ({"self_attn_dim": "8"}, {8: 208, 16: 304}),
        ({"cross_attn_dim": "8"}, {8: 200, 16: 312}),
        ({"ff_dim": "8"}, {8: 104, 16: 408}),
        ({"text_dim": "8", "ff_dim": "4"}, {8: 12, 4: 100, 16: 400}),
        ({"text_dim": "0", "cross_attn_dim": "0"}, {16: 300}),
        ({"embedder_dims": "[1,2,3,4]"}, {16: 512, 1: 1, 2: 1, 3: 1, 4: 2}),
        ({"block_dims": "0," * 49 + "8"}, {16: 12, 8: 10}),
        ({"block_dims": "0," * 49 + "8", "mod_dim": "2", "ff_dim": "4"}, {16: 8, 4: 6, 2: 3, 8: 8}),
        ({"network_reg_dims": r"out_layer\..*=5"}, {16: 512, 5: 2}),
        ({"include_patterns": r".*cross_attention\.to_value"}, {16: 50}),
    ],
)
def test_ranks(args: dict[str, str], expected: dict[int, int]) -> None:
    assert Counter(ranks(**args).values()) == expected


def test_embedders_come_in_the_order_of_the_text() -> None:
    found = ranks(embedder_dims="[1,2,3,4]")
    names = ("visual_embeddings", "text_embeddings", "pooled_text_embeddings", "time_embeddings")
    assert [found[f"{name}.in_layer"] for name in names] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def pair() -> Pair:
    made = make_pair(make_params())
    made.ours.requires_grad_(False)
    return made


@pytest.fixture(scope="module")
def inputs(pair: Pair) -> Inputs:
    return make_inputs(pair.ours.params, (5, 9), (4, 6))


def flat(outputs: list[Tensor]) -> Tensor:
    return torch.cat([output.flatten() for output in outputs])


def test_a_new_network_changes_no_bit_and_every_layer_takes_part(
    pair: Pair, inputs: Inputs, randomise: Callable
) -> None:
    model = pair.ours
    before = flat(inputs.ours(model))
    network = create_network(model, NetworkRequest(dim=4, alpha=1, args=EVERYTHING))
    assert set(network.paths.values()) == set(linear_layers(model.params))
    network.apply_to(model)
    try:
        assert torch.equal(flat(inputs.ours(model)), before)
        randomise(network)
        flat(inputs.ours(model)).square().sum().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())
    finally:
        network.remove()
    assert torch.equal(flat(inputs.ours(model)), before)


def test_agrees_with_peft_on_diffusers_model(pair: Pair, inputs: Inputs, randomise: Callable) -> None:
    """Outputs and gradients, with the official targets."""
    network = create_network(pair.ours, NetworkRequest(dim=4, alpha=6))
    randomise(network)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(network.paths.values()))
    pair.theirs.add_adapter(config, "trained")
    network.apply_to(pair.ours)
    try:
        layers = {name: pair.theirs.get_submodule(path) for name, path in network.paths.items()}
        for name, layer in layers.items():
            layer.lora_A["trained"].weight.data.copy_(network.loras[name].down)
            layer.lora_B["trained"].weight.data.copy_(network.loras[name].up)
        ours, theirs = flat(inputs.ours(pair.ours)), flat(inputs.theirs(pair.theirs))
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()
        weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
        (ours * weights).sum().backward()
        (theirs * weights).sum().backward()
        for name, layer in layers.items():
            expected = layer.lora_B["trained"].weight.grad
            assert (network.loras[name].up.grad - expected).norm() < 1e-3 * expected.norm(), name
    finally:
        network.remove()
        pair.theirs.delete_adapters("trained")


def test_the_wrong_module_is_told(pair: Pair) -> None:
    with pytest.raises(
        ConfigError, match="lora_lumina is for Lumina Image 2.0, but .* networks.lora_kandinsky5"
    ):
        create_lumina_network(pair.ours, NetworkRequest(dim=4))


PRESET = """
unet_target_module = ["Kandinsky5Attention", "Kandinsky5FeedForward"]
[module_algo_map.Kandinsky5Attention]
factor = 2
[module_algo_map.Kandinsky5FeedForward]
factor = 4
"""


def test_the_lycoris_example_of_simpletuner(
    pair: Pair, inputs: Inputs, randomise: Callable, tmp_path: Path
) -> None:
    """LoKr of whole matrices, each class of modules with a factor; and its file by SimpleTuner's names."""
    preset = tmp_path / "preset.toml"
    preset.write_text(PRESET)
    args = (f"preset={preset}", "algo=lokr", "full_matrix=True")
    options = NetworkOptions(
        network_module="lycoris.kohya", network_dim=10000, network_alpha=1.0, network_args=args
    )
    check_network(options)
    network = install_network(options, pair.ours, lambda: None, seed=1, learning_rate=1e-3)
    randomise(network)
    applied = flat(inputs.ours(pair.ours))
    network.remove()
    w1 = {network.paths[name]: tuple(lora.tensors["lokr_w1"].shape) for name, lora in network.loras.items()}
    assert len(w1) == 42
    assert {path.split(".")[2]: shape for path, shape in w1.items()} == {
        **{"self_attention": (2, 2), "cross_attention": (2, 2), "feed_forward": (4, 4)}
    }
    state = {key.replace("lora_unet_", "lycoris_"): t for key, t in network.export_state().items()}
    save_file(state, tmp_path / "a.safetensors")
    again = create_network_from_file(pair.ours, tmp_path / "a.safetensors")
    again.apply_to(pair.ours)
    assert torch.equal(flat(inputs.ours(pair.ours)), applied)
    again.remove()


@pytest.mark.parametrize(("preset", "count"), [("full", 42), ("attn-mlp", 42), ("attn-only", 32)])
def test_presets_of_lycoris_mean_this_models_blocks_too(pair: Pair, preset: str, count: int) -> None:
    options = NetworkOptions(network_module="lycoris.kohya", network_args=(f"preset={preset}", "algo=lokr"))
    network = install_network(options, pair.ours, lambda: None, seed=1, learning_rate=1e-3)
    network.remove()
    assert len(network.loras) == count
    assert not any("modulation" in name for name in network.loras)


def test_a_file_of_the_wrong_width_is_told(tmp_path: Path, pair: Pair) -> None:
    """The embedder of pictures is wider in the model that edits them: 33 channels, not 16."""
    tensors = {"down": torch.zeros(4, 132), "up": torch.zeros(64, 4)}
    name = "lora_unet_visual_embeddings_in_layer"
    save_file({f"{name}.lora_{side}.weight": t for side, t in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"has shape \(4, 132\), but this network needs \(4, 64\)"):
        create_network_from_file(pair.ours, tmp_path / "a.safetensors")
