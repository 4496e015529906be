"""`--network_module lycoris.kohya`: its arguments, its files, and its network in the place of a LoRA's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.core.errors import CheckpointError, ConfigError, MissingPackageError
from library.core.seeds import derive
from library.options.network import NetworkOptions
from networks.files import inspect_lora, save_network
from networks.from_file import create_network_from_file
from networks.layer import Dropouts, linear_layers
from networks.lora import LoRANetwork, merge
from networks.lycoris.args import PRESETS
from networks.lycoris.kinds import Settings
from networks.lycoris.layer import LycorisSize
from networks.lycoris.module import create_network
from networks.lycoris.network import LycorisNetwork
from networks.module import apply_base_weights, check_network, install_network, network_facts
from networks.request import NetworkRequest

Inputs = tuple[Tensor, Tensor, Tensor]
Make = Callable[..., nn.Module]
LOKR = LycorisSize("lokr", {"lokr_w1": (2, 2), "lokr_w2_a": (16, 2), "lokr_w2_b": (2, 6)}, Settings(2.0))
LOHA = LycorisSize(
    "loha", {"hada_w1_a": (32, 2), "hada_w1_b": (2, 12), "hada_w2_a": (32, 2), "hada_w2_b": (2, 12)}
)
OFT = LycorisSize("diag-oft", {"oft_blocks": (8, 4, 4)}, Settings(0.0))
W1 = "layers.0.feed_forward.w1"
NAME = "lora_unet_layers_0_feed_forward_w1"


def options(*args: str, **changes: object) -> NetworkOptions:
    return NetworkOptions(network_module="lycoris.kohya", network_args=args, **changes)


def installed(model: nn.Module, chosen: NetworkOptions, seed: int = 1) -> LoRANetwork:
    check_network(chosen)
    return install_network(chosen, model, nn.Module, seed=seed, learning_rate=1e-3)


@pytest.fixture
def model(lumina_like: Make) -> nn.Module:
    return lumina_like(layers=1)


def test_arguments_reach_the_network(model: nn.Module) -> None:
    args = ("algo=lokr", "factor=4", "rank_dropout=0.25", "dropout=0.5", "use_scalar=True", "conv_dim=4")
    network = installed(model, options(*args, network_dim=2, network_dropout=0.1))
    lora = network.loras[NAME]
    shapes = {name: tuple(tensor.shape) for name, tensor in lora.tensors.items()}
    assert shapes == {"lokr_w1": (4, 3), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 4), "scalar": ()}
    assert lora.dropouts == Dropouts(0.5, 0.25, 0.0)
    assert network_facts(network) == {"network_dim": 2, "network_alpha": 1.0}
    assert "layers.0.feed_forward.w1: lokr, alpha=1" in network.describe()


def test_start_weights_follow_the_seed_and_the_name(model: nn.Module) -> None:
    first, again, other = (LycorisNetwork(model, {W1: LOKR}, seed=seed).loras[NAME] for seed in (1, 1, 2))
    both = LycorisNetwork(model, {W1: LOKR, "layers.0.feed_forward.w3": LOKR}, seed=1)
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, again.tensors[name]) and torch.equal(
            tensor, both.loras[NAME].tensors[name]
        )
    assert not torch.equal(first.tensors["lokr_w1"], other.tensors["lokr_w1"])
    w3 = both.loras["lora_unet_layers_0_feed_forward_w3"]
    assert not torch.equal(first.tensors["lokr_w2_a"], w3.tensors["lokr_w2_a"])
    assert first.tensors["lokr_w1"].abs().max() <= 2**-0.5 and not first.tensors["lokr_w2_b"].any()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("algo=dylora",), "algo=dylora: it must be one of lora, .*; dylora is not made here"),
        (("algo=lorka",), "algo=lorka: it must be one of lora"),
        (("algos=lokr",), "unknown key 'algos'; did you mean 'algo'"),
        (("factor=0",), "a whole number above 0, or -1"),
        (("constraint=-1",), "a number, 0 or more"),
        (("train_norm=True",), "its norms are RMS norms"),
        (("preset=ful",), "preset=ful is no TOML file, and none of the presets full, "),
    ],
)
def test_mistakes_are_told(args: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_network(options(*args))


def test_the_presets_are_those_of_the_package() -> None:
    from lycoris.config import PRESET

    assert set(PRESETS) == set(PRESET)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("networks.lycoris.module.find_spec", lambda name: None)
    with pytest.raises(
        MissingPackageError, match="needs the package 'lycoris-lora': run `pip install lycoris-"
    ):
        check_network(options("algo=lokr"))


def test_sizes_that_cannot_be_are_told(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="cannot make algo=boft, .*--network_dim 4: It is impossible"):
        installed(model, options("algo=boft", network_dim=4))
    with pytest.raises(ConfigError, match="preset=attn-only fits no layer of the model"):
        installed(model, options("preset=attn-only"))


def test_what_has_no_effect_is_told(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        installed(model, options("algo=loha", "conv_dim=8", "factor=4", "dora_wd=True"))
    told = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert told == [
        "--network_args conv_dim has no effect: the model has no convolutions",
        "--network_args factor has no effect: it is for lokr",
    ]
    assert "LyCORIS: loha on 19 layers of the DiT" in caplog.text


def test_a_preset_can_be_a_file(model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    preset = tmp_path / "preset.toml"
    preset.write_text(
        'unet_target_module = ["WanAttentionBlock", "JointTransformerBlock"]\n'
        'unet_target_name = ["cap_embedder.*"]\nexclude_name = [".*refiner.*"]\n'
        "[module_algo_map.JointTransformerBlock]\nalgo = 'lokr'\nfactor = 2\n"
        "[name_algo_map.'cap_embedder.*']\nalgo = 'loha'\ndim = 2\n"
    )
    with caplog.at_level(logging.WARNING):
        network = installed(model, options(f"preset={preset}", "algo=full"))
    kinds = {network.paths[name]: lora.size.kind for name, lora in network.loras.items()}
    assert kinds == {"cap_embedder.1": "loha"} | {
        path: "lokr" for path in linear_layers(model) if "layers" in path
    }
    assert "lycoris: UNet: No modules matched" in caplog.text and "WanAttentionBlock" in caplog.text
    # and the next network is not touched by it
    assert len(installed(model, options("algo=ia3")).loras) == 19
    preset.write_text("unet_target_modul = []\n")
    with pytest.raises(ConfigError, match="Unknown preset keys: unet_target_modul"):
        installed(model, options(f"preset={preset}"))


def test_a_preset_with_an_untested_kind_is_refused(model: nn.Module, tmp_path: Path) -> None:
    preset = tmp_path / "preset.toml"
    preset.write_text('unet_target_name = ["x_embedder"]\n[name_algo_map.x_embedder]\nalgo = "glora"\n')
    with pytest.raises(ConfigError, match="asks for 'glora', which is not made here"):
        installed(model, options(f"preset={preset}"))


def test_training_goes_on_from_a_file(model: nn.Module, randomise: Callable, tmp_path: Path) -> None:
    args, path = ("algo=lokr", "use_scalar=True", "dora_wd=True"), tmp_path / "a.safetensors"
    network = installed(model, options(*args, network_dim=1))
    randomise(network)
    save_network(path, network.export_state(), {})
    network.remove()
    for changes in ({"network_dim": 1}, {"dim_from_weights": True}):
        given = args if "network_dim" in changes else ("module_dropout=0.5",)
        again = installed(model, options(*given, network_weights=path, **changes), seed=2)
        again.remove()
        assert all(torch.equal(tensor, load_file(path)[key]) for key, tensor in again.export_state().items())
        assert again.export_state().keys() == load_file(path).keys()
        assert ("scalar" in again.loras[NAME].tensors) == ("network_dim" in changes)
    with pytest.raises(
        ConfigError, match="a.safetensors is of the kind lokr, but algo is loha; --dim_from_w"
    ):
        installed(model, options("algo=loha", network_weights=path))
    with pytest.raises(CheckpointError, match="is a network of LyCORIS; .*--network_module lycoris.kohya"):
        check_network(NetworkOptions(network_module="networks.lora_lumina", network_weights=path))


def test_training_goes_on_from_a_plain_lora(model: nn.Module, randomise: Callable, tmp_path: Path) -> None:
    plain = NetworkOptions(network_module="networks.lora_lumina", network_args=("dora_wd=True",))
    network = installed(model, plain)
    randomise(network)
    path = tmp_path / "a.safetensors"
    save_network(path, network.export_state(), {})
    network.remove()
    again = installed(model, options(network_weights=path, dim_from_weights=True))
    assert again.loras[NAME].size.kind == "lora" and "dora_scale" in again.loras[NAME].tensors
    assert all(torch.equal(tensor, load_file(path)[key]) for key, tensor in again.export_state().items())


def test_files_can_have_other_names(
    model: nn.Module, randomise: Callable, inputs: Inputs, tmp_path: Path
) -> None:
    network = LycorisNetwork(model, {W1: LOHA, "layers.0.feed_forward.w3": LOKR})
    randomise(network)
    network.apply_to(model)
    expected = model(*inputs)
    network.remove()
    for old, new in (
        ("lora_unet_layers_0_feed_forward_", "lycoris_layers_0_feed_forward_"),
        ("lora_unet_layers_0_feed_forward_", "diffusion_model.layers.0.feed_forward."),
    ):
        path = tmp_path / "a.safetensors"
        save_file({k.replace(old, new): t for k, t in network.export_state().items()}, path)
        read = create_network_from_file(model, path)
        read.apply_to(model)
        assert torch.equal(model(*inputs), expected)
        read.remove()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lokr_w1": None}, "not complete: 'lora_unet_.*' lacks its lokr_w1 or lokr_w1_a and lokr_w1_b"),
        ({"lokr_w1": None, "lokr_w2_a": None, "lokr_w2_b": None, "alpha": ()}, "not a LoRA"),
        ({"lokr_t2": (2, 2, 3, 3)}, "has a LoKr of convolutions"),
        ({"lokr_w3": (2, 2)}, "no part of a lokr: lora_unet_.*lokr_w3"),
        ({"hada_w1_a": (2, 2)}, "makes no network for a linear layer"),
        ({"lokr_w1": (3, 2)}, "is for a layer of 12 to 48 features, but it has 12 to 32"),
    ],
)
def test_files_that_cannot_be_are_told(
    model: nn.Module, changes: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    shapes = dict(LOKR.shapes) | {"lokr_w2_x": ()} | changes
    tensors = {f"{NAME}.{k}": torch.ones(s) for k, s in shapes.items() if s is not None and k[-1] != "x"}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=message):
        create_network_from_file(model, tmp_path / "a.safetensors")


def test_a_file_for_another_model_is_told(model: nn.Module, tmp_path: Path) -> None:
    save_file({"lora_unet_layers_9_feed_forward_w1.diff": torch.ones(32, 12)}, tmp_path / "a.safetensors")
    with pytest.raises(
        CheckpointError, match="1 layers that this model lacks: lora_unet_layers_9.*did you mean"
    ):
        create_network_from_file(model, tmp_path / "a.safetensors")


def test_networks_of_both_sorts_add_up_and_merge(
    model: nn.Module,
    inputs: Inputs,
    sizes_of: Callable,
    randomise: Callable,
    lumina_like: Make,
    tmp_path: Path,
) -> None:
    lycoris = LycorisNetwork(
        model,
        {W1: LOKR, "layers.0.adaLN_modulation.1": LycorisSize("full", {"diff": (12, 12), "diff_b": (12,)})},
    )
    lora = LoRANetwork(model, sizes_of(model))
    for network in (lycoris, lora):
        randomise(network)
        network.apply_to(model)
    expected = model(*inputs)
    paths = (tmp_path / "lycoris.safetensors", tmp_path / "lora.safetensors")
    for path, network in zip(paths, (lycoris, lora), strict=True):
        save_network(path, network.export_state(), {})
    merged = lumina_like(layers=1)
    apply_base_weights(options(base_weights=paths), merged)
    assert torch.allclose(merged(*inputs), expected, atol=1e-4)
    lora.remove()
    alone = model(*inputs)
    assert not torch.allclose(alone, expected, atol=1e-2)
    merged = lumina_like(layers=1)
    merge(merged, [lycoris])
    assert torch.allclose(merged(*inputs), alone, atol=1e-4)
    lycoris.remove()
    assert not any(name.endswith("base") for name, _ in model.named_modules())


@pytest.mark.parametrize("size", [LOKR, LOHA, OFT], ids=lambda size: size.kind)
def test_only_the_input_is_kept_for_backward(size: LycorisSize, randomise: Callable) -> None:
    layer = nn.Sequential(nn.Linear(12, 32))
    network = LycorisNetwork(layer, {"0": size})
    randomise(network)
    network.apply_to(layer)
    small = {*(p.data_ptr() for p in network.parameters()), layer[0].base.weight.data_ptr()}
    kept: list[Tensor] = []
    x = torch.randn(700, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    large = [t for t in kept if t.data_ptr() not in small and t.numel() > 300]
    assert large and {t.data_ptr() for t in large} == {x.data_ptr()}


@pytest.mark.parametrize("size", [LOKR, LOHA, OFT], ids=lambda size: size.kind)
def test_half_precision_and_checkpointing(size: LycorisSize, randomise: Callable) -> None:
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(12, 32)).to(dtype)
        network = LycorisNetwork(layer, {"0": size})
        randomise(network)
        network.apply_to(layer)
        x = torch.randn(3, 50, 12).to(dtype).requires_grad_()
        for name, run in (
            ("plain", layer),
            ("again", lambda t, f=layer: checkpoint(f, t, use_reentrant=False)),
        ):
            network.zero_grad()
            x.grad = None
            y = run(x)
            assert y.dtype == dtype and y.shape == (3, 50, 32)
            y.float().square().sum().backward()
            grads = [p.grad for p in network.parameters()]
            assert all(grad.dtype == torch.float32 for grad in grads) and x.grad.dtype == dtype
            results[dtype, name] = [y.float().detach(), x.grad.float(), *grads]
        assert all(map(torch.equal, results[dtype, "plain"], results[dtype, "again"]))
    for wide, half in zip(results[torch.float32, "plain"], results[torch.bfloat16, "plain"], strict=True):
        assert (wide - half).norm() < 0.05 * wide.norm()


@pytest.mark.parametrize("size", [LOKR, LOHA, OFT], ids=lambda size: size.kind)
def test_bf16_weights(size: LycorisSize, randomise: Callable) -> None:
    """What --full_bf16 makes of a network."""
    layer = nn.Sequential(nn.Linear(12, 32)).bfloat16()
    network = LycorisNetwork(layer, {"0": size})
    randomise(network)
    x = torch.randn(50, 12).bfloat16()
    network.apply_to(layer)
    expected = layer(x)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16()
    y = layer(x)
    y.float().square().sum().backward()
    assert (y - expected).float().norm() < 0.03 * expected.float().norm()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in network.parameters())


def test_compiling_needs_one_graph(randomise: Callable) -> None:
    model = nn.Sequential(
        *(nn.Linear(*sizes) for sizes in ((12, 32), (32, 12), (12, 32), (32, 12), (12, 32)))
    )
    network = LycorisNetwork(model, {"0": LOKR, "2": LOHA, "4": OFT})
    randomise(network)
    network.apply_to(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (40, 50):
        x, results = torch.randn(rows, 12), []
        for run in (model, compiled):
            network.zero_grad()
            y = run(x)
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad for p in network.parameters())])
        for plain, own in zip(*results, strict=True):
            torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-3)


def test_dropouts(randomise: Callable) -> None:
    layer = nn.Sequential(nn.Linear(12, 32))
    x = torch.randn(40, 12)
    base = layer(x)
    network = LycorisNetwork(layer, {"0": LOKR})
    randomise(network)
    network.apply_to(layer)
    (lora,) = network.loras.values()
    whole = layer(x) - base

    def added(**probabilities: float) -> Tensor:
        lora.dropouts = Dropouts(**probabilities)
        torch.manual_seed(derive(1) % 2**31)
        return layer(x) - base

    network.train()
    rows = added(rank=0.5)
    gone = (rows == 0).all(0)
    assert 4 < gone.sum() < 28 and torch.allclose(rows[:, ~gone], whole[:, ~gone], atol=1e-6)
    entries = added(neuron=0.5)
    kept = entries != 0
    assert 0.4 < kept.float().mean() < 0.6 and torch.allclose(entries[kept], 2 * whole[kept], atol=1e-6)
    lora.dropouts = Dropouts(module=0.5)
    calls = [bool((layer(x) == base).all()) for _ in range(40)]
    assert 8 < sum(calls) < 32
    network.eval()
    assert torch.equal(layer(x) - base, whole)


def test_rank_dropout_can_keep_the_average(randomise: Callable) -> None:
    layer = nn.Sequential(nn.Linear(12, 32))
    x = torch.randn(40, 12)
    base = layer(x)
    size = LycorisSize(LOKR.kind, LOKR.shapes, LOKR.settings, rescale_dropout=True)
    network = LycorisNetwork(layer, {"0": size}, dropouts=Dropouts(rank=0.5))
    randomise(network)
    network.apply_to(layer)
    network.eval()
    whole = layer(x) - base
    network.train()
    rows = layer(x) - base
    kept = ~(rows == 0).all(0)
    assert torch.allclose(rows[:, kept], whole[:, kept] * 32 / kept.sum(), atol=1e-5)


@pytest.mark.parametrize("size", [LOKR, LOHA, OFT, LycorisSize("full", {"diff": (32, 12), "diff_b": (32,)})])
def test_max_norm(size: LycorisSize, model: nn.Module, randomise: Callable) -> None:
    layer = nn.Sequential(nn.Linear(12, 32))
    network = LycorisNetwork(layer, {"0": size})
    randomise(network)
    (lora,) = network.loras.values()
    before = lora.norm()
    if size.kind != "diag-oft":
        torch.testing.assert_close(before, lora.delta(layer[0].weight).norm())
    assert network.apply_max_norm(float(before) * 2)[0] == 0 and lora.norm() == before
    limit = float(before) / 3
    scaled, _, largest = network.apply_max_norm(limit).tolist()
    assert scaled == 1 and largest == pytest.approx(limit, rel=1e-5)
    assert float(lora.norm()) == pytest.approx(limit, rel=1e-4)


def test_groups_of_parameters(model: nn.Module) -> None:
    args = ("algo=lora", "dora_wd=True", "loraplus_lr_ratio=4")
    network = installed(model, options(*args))
    groups = {group["name"]: group for group in network.parameter_groups(1e-3)}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "lora": 1e-3,
        "lora_up": 4e-3,
        "lora_magnitude": 1e-3,
    }
    assert groups["lora_magnitude"]["weight_decay"] == 0.0
    parameters = [p for group in groups.values() for p in group["params"]]
    assert {id(p) for p in parameters} == {id(p) for p in network.parameters()} and len(parameters) == 19 * 3


def test_ia3_can_scale_what_a_layer_takes_in(model: nn.Module) -> None:
    network = installed(model, options("algo=ia3", "train_on_input=True"))
    lora = network.loras[NAME]
    assert lora.settings.on_input and lora.tensors["weight"].shape == (12,)


def test_an_ia3_file_says_its_side(model: nn.Module, randomise: Callable, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for on_input, count in ((True, 12), (False, 32)):
        size = LycorisSize("ia3", {"weight": (count,)}, Settings(on_input=on_input))
        network = LycorisNetwork(model, {W1: size})
        randomise(network)
        save_network(path, network.export_state(torch.bfloat16), {})
        assert load_file(path)[f"{NAME}.on_input"].dtype == torch.int64
        again = create_network_from_file(model, path)
        weight = linear_layers(model)[W1].weight
        torch.testing.assert_close(
            again.loras[NAME].delta(weight), network.loras[NAME].delta(weight), rtol=1e-2, atol=1e-2
        )
    assert inspect_lora(path).ranks == {NAME: 0}


def test_a_network_can_be_made_without_content(lumina_like: Make) -> None:
    model = lumina_like(layers=1).to("meta")
    network = create_network(
        model, NetworkRequest(dim=2, alpha=1.0, args={"algo": "lokr", "dora_wd": "True"})
    )
    network.apply_to(model)
    assert all(parameter.is_meta for parameter in network.parameters())
    x = [torch.empty(shape, device="meta") for shape in ((9, 12), (12,), (5, 12))]
    model(*x).sum().backward()
    assert network.loras[NAME].tensors["lokr_w1"].grad.is_meta
