"""Which layers of Lumina get a LoRA, of which rank; and networks made from files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.core.errors import CheckpointError, ConfigError
from library.options.network import NetworkOptions
from networks.files import save_network
from networks.from_file import create_network_from_file, create_text_network_from_file
from networks.lora import LoRANetwork
from networks.lora_lumina import check_options, create_network
from networks.request import NetworkRequest

Make = Callable[..., nn.Module]


@pytest.fixture
def full_size_names(lumina_like: Make) -> nn.Module:
    """A model with all the linear layers of the 2B model by name, small ones."""
    return lumina_like(layers=26, refiners=2)


def options(args: dict[str, str], **changes: object) -> NetworkOptions:
    words = tuple(f"{key}={value}" for key, value in args.items())
    return NetworkOptions(network_module="networks.lora_lumina", network_args=words, **changes)


def ranks(model: nn.Module, **args: str) -> dict[str, int]:
    network = create_network(model, NetworkRequest(dim=4, alpha=1, args=args))
    return {network.paths[name]: lora.rank for name, lora in network.loras.items()}


def test_default_layers_are_the_180_of_the_reference(full_size_names: nn.Module) -> None:
    network = create_network(full_size_names, NetworkRequest(dim=4, alpha=1))
    expected = {
        f"lora_unet_layers_{n}_{part}"
        for n in range(26)
        for part in (
            "attention_qkv",
            "attention_out",
            "feed_forward_w1",
            "feed_forward_w2",
            "feed_forward_w3",
            "adaLN_modulation_1",
        )
    }
    parts = {name.removeprefix("lora_unet_layers_0_") for name in expected if "layers_0_" in name}
    expected |= {f"lora_unet_noise_refiner_{n}_{part}" for n in (0, 1) for part in parts}
    expected |= {f"lora_unet_context_refiner_{n}_{p}" for n in (0, 1) for p in parts - {"adaLN_modulation_1"}}
    expected |= {"lora_unet_final_layer_linear", "lora_unet_final_layer_adaLN_modulation_1"}
    assert set(network.loras) == expected and len(expected) == 180
    assert len(network.export_state()) == 540
    assert {lora.scale for lora in network.loras.values()} == {0.25}


@pytest.mark.parametrize(
    ("blocks", "count"),
    [("all", 180), ("transformer", 156), ("refiners", 22), ("noise_refiner", 12), ("context_refiner", 10)],
)
def test_train_blocks(full_size_names: nn.Module, blocks: str, count: int) -> None:
    assert len(ranks(full_size_names, train_blocks=blocks)) == count


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"attn_dim": "9"}, {9: 60, 4: 120}),
        ({"mlp_dim": "9"}, {9: 90, 4: 90}),
        ({"mod_dim": "9"}, {9: 29, 4: 151}),
        ({"refiner_dim": "9"}, {9: 22, 4: 158}),
        ({"refiner_dim": "9", "attn_dim": "7"}, {9: 22, 7: 52, 4: 106}),
        ({"attn_dim": "0"}, {4: 120}),
        ({"refiner_dim": "0", "mlp_dim": "0", "mod_dim": "0"}, {4: 53}),
        ({"embedder_dims": "[5,6,7]"}, {4: 180, 5: 1, 6: 2, 7: 1}),
        ({"embedder_dims": "[5, 0, 7]", "train_blocks": "noise_refiner"}, {4: 12, 5: 1, 7: 1}),
    ],
)
def test_ranks_by_kind_of_layer(
    full_size_names: nn.Module, args: dict[str, str], expected: dict[int, int]
) -> None:
    assert Counter(ranks(full_size_names, **args).values()) == expected


def test_embedders_get_their_own_ranks(lumina_like: Make) -> None:
    found = ranks(lumina_like(), embedder_dims="[5,6,7]", mlp_dim="9")
    assert found["x_embedder"] == 5 and found["cap_embedder.1"] == 7
    assert found["t_embedder.mlp.0"] == found["t_embedder.mlp.2"] == 6
    assert found["layers.0.feed_forward.w1"] == 9


def test_dropouts_and_loraplus_reach_the_network(lumina_like: Make) -> None:
    args = {"rank_dropout": "0.1", "module_dropout": "0.2", "loraplus_lr_ratio": "4"}
    network = create_network(lumina_like(), NetworkRequest(dim=4, alpha=1, dropout=0.3, args=args))
    dropouts = next(iter(network.loras.values())).dropouts
    assert (dropouts.neuron, dropouts.rank, dropouts.module) == (0.3, 0.1, 0.2)
    assert [group["lr"] for group in network.parameter_groups(1.0)] == [1.0, 4.0]
    args = {"loraplus_lr_ratio": "4", "loraplus_unet_lr_ratio": "8"}
    network = create_network(lumina_like(), NetworkRequest(dim=4, alpha=1, args=args))
    assert [group["lr"] for group in network.parameter_groups(1.0)] == [1.0, 8.0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"atn_dim": "4"}, "unknown key 'atn_dim'; did you mean 'attn_dim'"),
        ({"attn_dim": "-1"}, "attn_dim=-1: it must be a whole number"),
        ({"attn_dim": "4.5"}, "whole number"),
        ({"embedder_dims": "[4,4]"}, r"embedder_dims=\[4,4\]: it must be \[x,t,cap\] with 3"),
        ({"embedder_dims": "4,4,4"}, r"\[x,t,cap\]"),
        ({"embedder_dims": "[4,-1,4]"}, r"\[x,t,cap\]"),
        ({"train_blocks": "refiner"}, "one of all, transformer, refiners"),
        ({"rank_dropout": "1.0"}, "from 0 to below 1"),
        ({"module_dropout": "nan"}, "from 0 to below 1"),
        ({"loraplus_lr_ratio": "0"}, "above 0"),
        ({"verbose": "yes"}, "True or False"),
        ({"split_qkv": "maybe"}, "True or False"),
        ({"exclude_patterns": "layers(.*"}, "a regular expression"),
        ({"include_patterns": "['.*', '(']"}, "a regular expression"),
        ({"network_reg_dims": ".*attention.*"}, "pattern=value, separated by commas"),
        ({"network_reg_dims": ".*attention.*=4.5"}, "whole number"),
        ({"network_reg_lrs": ".*attention.*=0"}, "above 0"),
        ({"network_reg_lrs": ".*=1e-4,,x"}, "pattern=value"),
        ({"block_dims": "4,4,x"}, "whole number"),
        ({"block_lrs": "1e-4,-1"}, "above 0"),
        ({"weight_decompose": "maybe"}, "weight_decompose=maybe: it must be True or False"),
        ({"dora_wd": "True", "use_dora": "True"}, "use_dora is another name of dora_wd"),
        ({"wd_on_output": "True"}, "add dora_wd=True"),
        ({"init_lora_weights": "pizza"}, "one of kaiming, gaussian, pissa, pissa_niter_16, olora"),
        ({"init": "pissa_niter_0"}, "another number of rounds"),
    ],
)
def test_bad_arguments_are_answered_with_what_they_must_be(args: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(options(args))


def test_leaving_every_layer_out_is_an_error(lumina_like: Make) -> None:
    args = {"attn_dim": "0", "mlp_dim": "0", "mod_dim": "0", "train_blocks": "transformer"}
    with pytest.raises(ConfigError, match="no layer to train"):
        create_network(lumina_like(), NetworkRequest(dim=4, alpha=1, args=args))
    with pytest.raises(ConfigError, match="no layer to train"):
        create_network(nn.Sequential(nn.Linear(4, 4)), NetworkRequest(dim=4, alpha=1))


def saved(path: Path, model: nn.Module, randomise: Callable, **args: str) -> LoRANetwork:
    network = create_network(model, NetworkRequest(dim=4, alpha=3, args=args))
    randomise(network)
    save_network(path, network.export_state(), {"ss_base_model_version": "lumina2"})
    return network


def test_a_file_makes_the_network_that_wrote_it(
    lumina_like: Make, inputs: tuple[Tensor, ...], randomise: Callable, tmp_path: Path
) -> None:
    model, path = lumina_like(), tmp_path / "lora.safetensors"
    args = {"attn_dim": "2", "refiner_dim": "6", "embedder_dims": "[1,2,3]", "mod_dim": "0"}
    network = saved(path, model, randomise, **args)
    network.apply_to(model)
    network.multiplier = 0.6
    expected = model(*inputs)
    network.remove()
    again = create_network_from_file(model, path, multiplier=0.6)
    again.apply_to(model)
    assert torch.equal(model(*inputs), expected)
    assert again.loras.keys() == network.loras.keys() and again.multiplier == 0.6


def test_a_bf16_file_with_an_odd_alpha_loads(lumina_like: Make, randomise: Callable, tmp_path: Path) -> None:
    network = create_network(lumina_like(), NetworkRequest(dim=4, alpha=0.3))
    randomise(network)
    state = {key: tensor.to(torch.bfloat16) for key, tensor in network.export_state().items()}
    save_network(tmp_path / "lora.safetensors", state, {})
    loaded = create_network_from_file(lumina_like(), tmp_path / "lora.safetensors")
    assert next(iter(loaded.loras.values())).alpha == torch.tensor(0.3, dtype=torch.bfloat16).item()
    network.load_state(state, "the bf16 file")  # its alpha is ours as far as bf16 can tell


def test_a_file_for_another_model_is_refused(lumina_like: Make, randomise: Callable, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    saved(path, lumina_like(layers=3), randomise)
    with pytest.raises(
        CheckpointError, match=r"6 layers that this model lacks: lora_unet_layers_2.*'lumina2'"
    ):
        create_network_from_file(lumina_like(layers=2), path)


def test_the_part_for_the_text_encoder_is_left_to_the_text_encoder(
    lumina_like: Make, randomise: Callable, tmp_path: Path
) -> None:
    network = create_network(lumina_like(), NetworkRequest(dim=4, alpha=1))
    state = network.export_state()
    state["lora_te_layers_0_mlp_up_proj.lora_down.weight"] = torch.zeros(4, 8)
    state["lora_te_layers_0_mlp_up_proj.lora_up.weight"] = torch.zeros(8, 4)
    save_network(tmp_path / "lora.safetensors", state, {})
    read = create_network_from_file(lumina_like(), tmp_path / "lora.safetensors")
    assert read.loras.keys() == network.loras.keys()
    encoder = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(8, 8)})])})
    with pytest.raises(
        CheckpointError, match="1 layers that this text encoder lacks: lora_te_layers_0_mlp_up"
    ):
        create_text_network_from_file(encoder, tmp_path / "lora.safetensors")


def test_a_file_of_another_width_is_refused(lumina_like: Make, tmp_path: Path) -> None:
    state = create_network(lumina_like(), NetworkRequest(dim=4, alpha=1)).export_state()
    state["lora_unet_layers_0_attention_qkv.lora_down.weight"] = torch.zeros(4, 99)
    save_network(tmp_path / "lora.safetensors", state, {})
    with pytest.raises(CheckpointError, match=r"qkv.lora_down.weight' has shape \(4, 99\).* another width"):
        create_network_from_file(lumina_like(), tmp_path / "lora.safetensors")


def test_patterns_choose_layers(lumina_like: Make) -> None:
    model = lumina_like(layers=12)
    everything = ranks(model)
    only = ranks(model, include_patterns=r"layers\.1[01]\.attention\..*")
    assert set(only) == {f"layers.{n}.attention.{part}" for n in (10, 11) for part in ("qkv", "out")}
    without = ranks(model, exclude_patterns=r"['.*adaLN_modulation.*', '.*refiner.*']")
    assert set(without) == {p for p in everything if "adaLN" not in p and "refiner" not in p}
    some = ranks(model, exclude_patterns=r".*", include_patterns=r"['.*\.w2', 'final_layer.linear']")
    assert set(some) == {p for p in everything if p.endswith(".w2") or p == "final_layer.linear"}


def test_patterns_and_blocks_set_ranks_alphas_and_rates(lumina_like: Make) -> None:
    model = lumina_like(layers=3)
    found = ranks(
        model,
        network_reg_dims=r"layers\.\d{1,2}\.attention.*=7, x_embedder=2",
        block_dims="0,5,6",
        mlp_dim="9",
    )
    assert not any(path.startswith("layers.0.") and "attention" not in path for path in found)
    assert found["layers.0.attention.qkv"] == found["layers.2.attention.out"] == 7
    assert found["layers.1.feed_forward.w1"] == 9 and found["layers.1.adaLN_modulation.1"] == 5
    assert found["x_embedder"] == 2 and found["final_layer.linear"] == 4
    args = {
        "block_alphas": "1,2,8",
        "block_lrs": "1e-4,1e-4,3e-4",
        "network_reg_lrs": r".*\.w1=5e-5,.*qkv=1e-6",
    }
    network = create_network(model, NetworkRequest(dim=4, alpha=1, args=args))
    assert network.loras["lora_unet_layers_2_attention_out"].scale == 2.0
    assert network.loras["lora_unet_final_layer_linear"].scale == 0.25
    groups = {group["name"]: group for group in network.parameter_groups(1e-3)}
    assert {name: group["lr"] for name, group in groups.items()} == {
        **{"lora": 1e-3, "lora_0.0001": 1e-4, "lora_0.0003": 3e-4, "lora_5e-05": 5e-5, "lora_1e-06": 1e-6}
    }
    assert sum(len(group["params"]) for group in groups.values()) == len(list(network.parameters()))
    w1 = network.loras["lora_unet_layers_0_feed_forward_w1"].down
    assert any(parameter is w1 for parameter in groups["lora_5e-05"]["params"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"exclude_patterns": "attention"},
            "'attention' matches no layer .*whole of a path such as x_embedder",
        ),
        ({"network_reg_dims": "layers=4"}, "network_reg_dims: 'layers' matches no layer"),
        ({"block_dims": "4,4,4"}, "block_dims has 3 values, but the model has 2 blocks"),
        ({"block_lrs": "1e-4"}, "block_lrs has 1 values"),
    ],
)
def test_arguments_that_do_not_fit_the_model(lumina_like: Make, args: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_network(lumina_like(), NetworkRequest(dim=4, alpha=1, args=args))


@pytest.mark.parametrize(("alpha", "scale"), [(1.0, 0.5), (8.0, 4.0), (0.0, 2.0)])
def test_rank_stabilised_scale_is_what_any_reader_computes(
    lumina_like: Make, alpha: float, scale: float
) -> None:
    network = create_network(lumina_like(), NetworkRequest(dim=4, alpha=alpha, args={"rs_lora": "True"}))
    assert {lora.scale for lora in network.loras.values()} == {scale}
    assert network.export_state()["lora_unet_final_layer_linear.alpha"].item() / 4 == scale


def split_network(model: nn.Module, randomise: Callable, **args: str) -> LoRANetwork:
    network = create_network(model, NetworkRequest(dim=4, alpha=2, args={"split_qkv": "True", **args}))
    randomise(network)
    return network


def test_split_qkv_acts_on_q_k_and_v_apart(lumina_like: Make, randomise: Callable) -> None:
    model = lumina_like()
    network = split_network(model, randomise)
    lora = network.loras["lora_unet_layers_0_attention_qkv"]
    delta = lora.delta(model.get_submodule("layers.0.attention.qkv").weight)
    starts = {"q": 0, "k": 12, "v": 16}
    for n, (first, width) in enumerate(zip(starts.values(), (12, 4, 4), strict=True)):
        own_up, own_down = lora.up[first : first + width], lora.down[4 * n : 4 * n + 4]
        assert torch.allclose(delta[first : first + width], 0.5 * own_up @ own_down, atol=1e-6)
    assert type(network.loras["lora_unet_layers_0_attention_out"]) is not type(lora)
    trained = sum(network.loras["lora_unet_layers_0_attention_qkv"].up.shape)
    assert trained == 20 + 4  # no zeros of the block-diagonal matrix are trained


def test_split_qkv_files_are_plain_loras_of_the_same_effect(
    lumina_like: Make, inputs: tuple[Tensor, ...], randomise: Callable, tmp_path: Path
) -> None:
    model, path = lumina_like(), tmp_path / "lora.safetensors"
    network = split_network(model, randomise)
    save_network(path, network.export_state(), {})
    network.apply_to(model)
    expected = model(*inputs)
    network.remove()
    plain = create_network_from_file(model, path)
    lora = plain.loras["lora_unet_layers_0_attention_qkv"]
    assert (lora.rank, lora.alpha, lora.scale) == (12, 6.0, 0.5)
    plain.apply_to(model)
    assert torch.allclose(model(*inputs), expected, atol=1e-6)
    assert not lora.up[:12, 4:].any() and not lora.up[12:16, :4].any() and not lora.up[16:, :8].any()


def test_split_qkv_can_be_continued_from_its_file(lumina_like: Make, randomise: Callable) -> None:
    first = split_network(lumina_like(), randomise)
    second = create_network(lumina_like(), NetworkRequest(dim=4, alpha=2, args={"split_qkv": "True"}, seed=9))
    second.load_state(first.export_state())
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)
    fused = create_network(lumina_like(), NetworkRequest(dim=12, alpha=6))
    randomise(fused)
    state = second.export_state() | {k: v for k, v in fused.export_state().items() if "qkv" in k}
    before = second.export_state()
    with pytest.raises(CheckpointError, match="other.safetensors, '.*qkv': its parts .*trained together"):
        second.load_state(state, "other.safetensors")
    assert all(torch.equal(tensor, before[key]) for key, tensor in second.export_state().items())


def test_split_qkv_learns_with_every_part(lumina_like: Make, inputs: tuple[Tensor, ...]) -> None:
    model = lumina_like()
    args = {"split_qkv": "True", "rank_dropout": "0.1", "include_patterns": "layers.*qkv"}
    network = create_network(model, NetworkRequest(dim=2, alpha=2, dropout=0.1, args=args))
    network.apply_to(model)
    before = {name: lora.up.detach().clone() for name, lora in network.loras.items()}
    optimizer = torch.optim.AdamW(network.parameter_groups(lr=1e-2))
    torch.manual_seed(0)
    for _ in range(3):
        model(*inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, lora in network.loras.items():
        assert all((part != 0).any() for part in (lora.up - before[name]).split(lora.widths))
