"""LoRA on the text encoder: gradients through Gemma2, its files, and both networks as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.core.errors import CheckpointError, ConfigError
from library.models.gemma2 import Gemma2Encoder
from library.models.gemma2_format import Gemma2Params
from library.options.caching import CachingOptions
from library.options.network import NetworkOptions
from networks.files import inspect_lora, save_network
from networks.from_file import create_network_from_file, create_text_network_from_file
from networks.layer import LoRALinear
from networks.lora import LoRANetwork
from networks.module import (
    apply_base_text_weights,
    apply_base_weights,
    base_text_identity,
    check_network,
    install_network,
)

PARAMS = Gemma2Params(
    vocab=64,
    hidden=16,
    layers=4,
    heads=2,
    kv_heads=1,
    head_dim=8,
    ffn_dim=24,
    query_pre_attn_scalar=8,
    sliding_window=16,
    attn_logit_softcapping=50.0,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
)
TOKENS = [[2, 5, 9, 33], [2, 40, 41, 42, 43, 7]]
PARTS = (
    *("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_o_proj"),
    *("mlp_gate_proj", "mlp_up_proj", "mlp_down_proj"),
)
Make = Callable[..., nn.Module]


def make_encoder() -> Gemma2Encoder:
    torch.manual_seed(0)
    encoder = Gemma2Encoder(PARAMS)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return encoder.requires_grad_(False).eval()


def install(encoder: nn.Module, model: nn.Module, **changes: object) -> LoRANetwork:
    changes.setdefault("network_train_text_encoder", True)
    options = NetworkOptions(network_module="networks.lora_lumina", **changes)
    return install_network(options, model, lambda: encoder, seed=1, learning_rate=1e-3)


def features(encoder: Gemma2Encoder) -> Tensor:
    return torch.cat(encoder.encode(TOKENS))


def text_gradients(encoder: Gemma2Encoder, network: LoRANetwork) -> dict[str, Tensor]:
    network.zero_grad()
    features(encoder).square().sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def test_every_layer_that_is_built_gets_a_lora_without_effect(lumina_like: Make) -> None:
    encoder = make_encoder()
    before = features(encoder)
    assert not before.requires_grad
    network = install(encoder, lumina_like(), network_train_text_encoder_only=True)
    assert set(network.loras) == {f"lora_te_layers_{n}_{part}" for n in range(3) for part in PARTS}
    after = features(encoder)
    assert after.requires_grad and torch.equal(after, before)


def test_agrees_with_peft(lumina_like: Make, randomise: Callable) -> None:
    encoder, other = make_encoder(), make_encoder()
    network = install(encoder, lumina_like(), network_train_text_encoder_only=True, network_alpha=2.0)
    randomise(network)
    names = [name for name, module in other.model.named_modules() if isinstance(module, nn.Linear)]
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=names)
    theirs = peft.get_peft_model(other.model, config).base_model.model
    pairs = {}
    for name, path in network.paths.items():
        layer = theirs.get_submodule(path)
        pairs[name] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        with torch.no_grad():
            pairs[name][0].copy_(network.loras[name].down)
            pairs[name][1].copy_(network.loras[name].up)
    assert torch.allclose(features(encoder), features(other), atol=1e-4)
    ours = text_gradients(encoder, network)
    features(other).square().sum().backward()
    assert len(ours) == 2 * len(pairs)
    for name, (down, up) in pairs.items():
        assert (ours[f"loras.{name}.down"] - down.grad).norm() <= 1e-3 * down.grad.norm(), name
        assert (ours[f"loras.{name}.up"] - up.grad).norm() <= 1e-3 * up.grad.norm(), name


def test_checkpointing_changes_no_gradient(lumina_like: Make, randomise: Callable) -> None:
    encoder = make_encoder()
    network = install(encoder, lumina_like(), network_train_text_encoder_only=True)
    randomise(network)
    plain = text_gradients(encoder, network)
    kept = saved_bytes(encoder)
    encoder.gradient_checkpointing = True
    assert encoder.gradient_checkpointing
    checkpointed = text_gradients(encoder, network)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.allclose(plain[name], gradient, atol=1e-6) for name, gradient in checkpointed.items())
    assert saved_bytes(encoder) < kept / 2
    encoder.gradient_checkpointing = False
    assert not encoder.training


def saved_bytes(encoder: Gemma2Encoder) -> int:
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features(encoder)
    return sum(kept.values())


def test_both_networks_are_one(
    lumina_like: Make, inputs: tuple[Tensor, ...], randomise: Callable, tmp_path: Path
) -> None:
    encoder, model = make_encoder(), lumina_like()
    before = features(encoder), model(*inputs)
    args = ("loraplus_text_encoder_lr_ratio=4", "attn_dim=2", "network_reg_lrs=.*w1=1e-6")
    network = install(encoder, model, text_encoder_lr=(5e-5,), network_args=args)
    groups = {group["name"]: group["lr"] for group in network.parameter_groups(1e-2)}
    assert groups == {
        **{"text_encoder_5e-05_down": 5e-5, "text_encoder_5e-05_up": 2e-4},
        **{"lora": 1e-2, "lora_1e-06": 1e-6},
    }
    grouped = [p for group in network.parameter_groups(1e-2) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(network.parameters()))
    randomise(network)
    acting = features(encoder), model(*inputs)
    assert all(not torch.allclose(a, b) for a, b in zip(before, acting, strict=True))
    network.enabled = False
    assert all(torch.equal(a, b) for a, b in zip(before, (features(encoder), model(*inputs)), strict=True))
    network.enabled = True
    path = tmp_path / "both.safetensors"
    save_network(path, network.export_state(), {})
    assert {key.partition("_layers")[0] for key in load_file(path)} >= {"lora_te", "lora_unet"}
    continued = install(
        make_encoder(),
        lumina_like(),
        network_weights=path,
        dim_from_weights=True,
        network_args=("loraplus_lr_ratio=2",),
    )
    assert all(torch.equal(tensor, load_file(path)[key]) for key, tensor in continued.export_state().items())
    network.remove()
    assert not any(isinstance(module, LoRALinear) for m in (encoder, model) for module in m.modules())
    create_text_network_from_file(encoder.model, path).apply_to(encoder.model)
    create_network_from_file(model, path).apply_to(model)
    assert torch.allclose(features(encoder), acting[0], atol=1e-6)
    assert torch.allclose(model(*inputs), acting[1], atol=1e-6)
    assert network.apply_max_norm(0.01)[0] == len(network.loras)


def test_loras_of_the_last_layer_have_no_effect_and_are_left_out(
    lumina_like: Make, randomise: Callable, tmp_path: Path
) -> None:
    network = install(make_encoder(), lumina_like(), network_train_text_encoder_only=True)
    randomise(network)
    state = network.export_state()
    last = {key.replace("layers_2", "layers_3"): t.clone() for key, t in state.items() if "layers_2" in key}
    save_network(tmp_path / "lora.safetensors", state | last, {})
    read = create_text_network_from_file(make_encoder().model, tmp_path / "lora.safetensors")
    assert read.export_state().keys() == state.keys()
    assert inspect_lora(tmp_path / "lora.safetensors").has_text_encoder


def test_base_weights_are_merged_into_both_models(
    lumina_like: Make, inputs: tuple[Tensor, ...], randomise: Callable, tmp_path: Path
) -> None:
    encoder, model = make_encoder(), lumina_like()
    before = features(encoder)
    network = install(encoder, model, network_args=("dora_wd=True",))
    randomise(network)
    expected = features(encoder).detach(), model(*inputs).detach()
    save_network(tmp_path / "both.safetensors", network.export_state(), {})
    for name in ("dit", "text"):
        part = {
            k: v for k, v in network.export_state().items() if k.startswith("lora_te_") == (name == "text")
        }
        save_network(tmp_path / f"{name}.safetensors", part, {})
    network.remove()
    for names in (("both",), ("dit", "text"), ("text", "dit")):
        encoder, model = make_encoder(), lumina_like()
        files = tuple(tmp_path / f"{name}.safetensors" for name in names)
        options = NetworkOptions(network_module="networks.lora_lumina", base_weights=files)
        check_network(options)
        apply_base_weights(options, model)
        apply_base_text_weights(options, encoder)
        assert torch.allclose(model(*inputs), expected[1], atol=1e-4)
        assert torch.allclose(features(encoder), expected[0], atol=1e-4)
    assert not torch.allclose(expected[0], before, atol=1e-2)


def test_what_changes_the_text_encoder_is_told_to_the_caches(
    lumina_like: Make, randomise: Callable, tmp_path: Path
) -> None:
    def identity(*names: str, **changes: object) -> str:
        files = tuple(tmp_path / f"{name}.safetensors" for name in names)
        options = NetworkOptions(network_module="networks.lora_lumina", base_weights=files, **changes)
        return base_text_identity(options, lambda path: str(path.read_bytes()))

    network = install(make_encoder(), lumina_like())
    for seed, name in enumerate(("first", "second")):
        randomise(network, seed)
        save_network(tmp_path / f"{name}.safetensors", network.export_state(), {})
    dit = {k: v for k, v in network.export_state().items() if k.startswith("lora_unet_")}
    save_network(tmp_path / "dit.safetensors", dit, {})
    assert identity() == identity("dit") == identity("first", base_weights_multiplier=(0.0,)) == ""
    assert identity("first", "dit") == identity("dit", "first") == identity("first") != ""
    others = (
        identity("second"),
        identity("first", base_weights_multiplier=(0.5,)),
        identity("first", "second"),
    )
    assert len({identity("first"), *others}) == 4


def test_a_file_with_the_last_layer_can_be_trained_on(
    lumina_like: Make, randomise: Callable, tmp_path: Path
) -> None:
    network = install(make_encoder(), lumina_like())
    randomise(network)
    state, path = network.export_state(), tmp_path / "both.safetensors"
    last = {
        k.replace("te_layers_2", "te_layers_3"): t.clone() for k, t in state.items() if "te_layers_2" in k
    }
    save_network(path, state | last, {})
    for changes in ({}, {"dim_from_weights": True}):
        again = install(make_encoder(), lumina_like(), network_weights=path, **changes)
        assert all(torch.equal(tensor, state[key]) for key, tensor in again.export_state().items())


@pytest.mark.parametrize(
    "prefix",
    ["text_encoder.model.", "text_encoder.", "text_encoders.gemma2_2b.transformer.model.", "lora_te1_"],
)
def test_other_names_of_the_text_encoder(
    lumina_like: Make, randomise: Callable, tmp_path: Path, prefix: str
) -> None:
    network = install(make_encoder(), lumina_like(), network_train_text_encoder_only=True)
    randomise(network)
    state = {}
    for name, path in network.paths.items():
        module = prefix + (path if prefix.endswith(".") else path.replace(".", "_"))
        state[f"{module}.lora_A.weight"] = network.loras[name].down.detach()
        state[f"{module}.lora_B.weight"] = network.loras[name].up.detach()
    save_file(state, tmp_path / "lora.safetensors")
    file = inspect_lora(tmp_path / "lora.safetensors")
    assert file.has_text_encoder and set(file.ranks) == set(network.loras)


def test_the_text_encoder_is_trained_only_on_request(lumina_like: Make, tmp_path: Path) -> None:
    def never() -> nn.Module:
        raise AssertionError("the text encoder was loaded")

    for changes in ({}, {"network_train_unet_only": True}, {"text_encoder_lr": (0.0,)}):
        options = NetworkOptions(network_module="networks.lora_lumina", **changes)
        install_network(options, lumina_like(), never, seed=1, learning_rate=1e-3)
        options.check_caches(CachingOptions(cache_text_encoder_outputs=True))
    asked = NetworkOptions(network_module="networks.lora_lumina", text_encoder_lr=(1e-5,))
    with pytest.raises(ConfigError, match="would learn nothing"):
        asked.check_caches(CachingOptions(cache_text_encoder_outputs=True))


def test_parts_of_files_that_would_be_lost_are_refused(
    lumina_like: Make, randomise: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "both.safetensors"
    save_network(path, install(make_encoder(), lumina_like()).export_state(), {})
    for changes, message in (
        ({"network_weights": path}, "train that too, with --network_train_text_encoder"),
        ({"network_weights": path, "network_train_text_encoder_only": True}, "is for the DiT too"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_network(NetworkOptions(network_module="networks.lora_lumina", **changes))
    for changes, message in (
        (
            {"network_args": ("attn_dim=2",), "network_train_text_encoder_only": True},
            "attn_dim is for the DiT",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            check_network(NetworkOptions(network_module="networks.lora_lumina", **changes))
