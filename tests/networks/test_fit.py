"""Networks to start from, told from their headers as the network will judge them once there is a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.core.errors import CheckpointError, ConfigError
from library.models import kandinsky5_format, lumina2_format
from library.models.kandinsky5_dit import Kandinsky5DiT
from library.models.kandinsky5_format import Kandinsky5Params
from library.models.lumina2_format import NextDiTParams
from library.models.nextdit import NextDiT
from library.options.network import NetworkOptions
from networks.files import inspect_lora, save_network
from networks.fit import Shapes, check_widths
from networks.module import check_layers, check_network, install_network

LUMINA = NextDiTParams(
    dim=48, n_layers=2, n_noise_refiners=1, n_context_refiners=1, n_heads=4, n_kv_heads=2, head_dim=12,
    ffn_dim=64, cap_feat_dim=20, time_dim=48, time_frequencies=16, in_channels=4, axes_dims=(4, 4, 4),
)  # fmt: skip
KANDINSKY = {
    task: Kandinsky5Params(
        model_dim=64, ff_dim=128, n_text_blocks=1, n_visual_blocks=2, head_dim=32, text_dim=20, pooled_dim=24,
        time_dim=32, axes_dims=(8, 12, 12), in_channels=channels,
    )
    for task, channels in (("t2i", 16), ("i2i", 33))
}  # fmt: skip
LAYERS: dict[str, Shapes] = {
    "lumina": lumina2_format.linear_layers(LUMINA),
    **{task: kandinsky5_format.linear_layers(params) for task, params in KANDINSKY.items()},
}


def make_model(name: str) -> nn.Module:
    return NextDiT(LUMINA) if name == "lumina" else Kandinsky5DiT(KANDINSKY[name])


def options(name: str, *args: str, **changes: object) -> NetworkOptions:
    module = "networks.lora_lumina" if name == "lumina" else "networks.lora_kandinsky5"
    usual: dict[str, object] = {"network_dim": 4, "network_alpha": 2.0}
    return NetworkOptions(network_module=module, network_args=args, **usual | changes)


def trained(path: Path, name: str, *args: str, **changes: object) -> Path:
    """Write what a run with these options saves."""
    network = install_network(
        options(name, *args, **changes), make_model(name), list, seed=0, learning_rate=1
    )
    save_network(path, network.export_state(), {})
    return path


EMBEDDED = "embedder_dims=[4,4,4,4]"
# model, arguments of the file's network, of the one to be trained, and what is said of the two
CASES = {
    "the same": ("lumina", ("attn_dim=8",), ("attn_dim=8",), None),
    "the same parts": ("lumina", ("split_qkv=True",), ("split_qkv=True",), None),
    "the same scale": ("t2i", ("rs_lora=True",), ("rs_lora=True",), None),
    "the same DoRA": ("t2i", ("dora_wd=True",), ("dora_wd=True",), None),
    "another rank": (
        "lumina",
        ("attn_dim=8",),
        (),
        r"attention_qkv' has rank 8, but 4 is wanted; .*--dim_from",
    ),
    "parts": ("lumina", (), ("split_qkv=True",), "attention_qkv' has rank 4, but 12 is wanted"),
    "another alpha": ("t2i", ("rs_lora=True",), (), "has alpha 4, but 2 is wanted; .*--dim_from_weights"),
    "more layers": ("t2i", (EMBEDDED,), (), "has LoRAs for 5 layers that would get none: .*embeddings"),
    "fewer layers": ("i2i", (), (EMBEDDED,), "lacks LoRAs for 5 layers: .*embeddings"),
    "a DoRA": ("t2i", ("dora_wd=True",), (), "is a DoRA of input features, but a plain LoRA is wanted"),
    "no DoRA": (
        "lumina",
        (),
        ("dora_wd=True", "wd_on_output=True"),
        "is a plain LoRA, but a DoRA of output features is wanted",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_to_start_from_is_judged_by_its_header_as_by_the_network(case: str, tmp_path: Path) -> None:
    name, of_file, args, message = CASES[case]
    chosen = options(name, *args, network_weights=trained(tmp_path / "a.safetensors", name, *of_file))
    check_network(chosen)
    if message is None:
        check_layers(chosen, LAYERS[name])
        install_network(chosen, make_model(name), list, seed=0, learning_rate=1)
        return
    with pytest.raises(CheckpointError, match=f"--network_weights .*a.safetensors.*{message}"):
        check_layers(chosen, LAYERS[name])
    with pytest.raises(CheckpointError):
        install_network(chosen, make_model(name), list, seed=0, learning_rate=1)
    check_layers(options(name, network_weights=chosen.network_weights, dim_from_weights=True), LAYERS[name])


def test_alphas_are_read_in_every_precision(tmp_path: Path) -> None:
    path = trained(tmp_path / "a.safetensors", "t2i", network_alpha=3.3)
    state, chosen = load_file(path), options("t2i", network_weights=path, network_alpha=3.3)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        save_file({key: t.to(dtype).reshape(1) if t.ndim == 0 else t for key, t in state.items()}, path)
        check_layers(chosen, LAYERS["t2i"])
    key = next(key for key in state if key.endswith(".alpha"))
    save_file(state | {key: torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=f"'{key}' is not a single number"):
        check_layers(chosen, LAYERS["t2i"])


def test_a_network_of_the_other_task_is_told_wherever_it_is_named(tmp_path: Path) -> None:
    path = trained(tmp_path / "a.safetensors", "t2i", EMBEDDED)
    message = (
        "visual_embeddings_in_layer' is for a layer of 64 to 64 features, .* has 132 to 64; .*another task"
    )
    for changes in (
        {"network_weights": path, "dim_from_weights": True},
        {"network_weights": path, "dim_from_weights": False},
        {"base_weights": (path,)},
    ):
        with pytest.raises(CheckpointError, match=message):
            check_layers(options("i2i", **changes), LAYERS["i2i"])
    with pytest.raises(CheckpointError, match=message):
        check_widths(inspect_lora(path), LAYERS["i2i"])
    check_widths(inspect_lora(trained(tmp_path / "b.safetensors", "t2i")), LAYERS["i2i"])  # no embedder


def test_nothing_to_train_is_told_before_there_is_a_model() -> None:
    for name in ("lumina", "t2i"):
        with pytest.raises(ConfigError, match="leave no layer to train; raise a rank above 0"):
            check_layers(options(name, "exclude_patterns=.*"), LAYERS[name])
    check_layers(options("lumina", network_train_text_encoder_only=True), LAYERS["lumina"])


def test_matrices_that_do_not_go_together_are_no_lora(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for up in ((64, 3), (64,)):
        down = "lora_unet_layers_0_attention_out.lora_down.weight"
        save_file({down: torch.zeros(4, 48), down.replace("down", "up"): torch.zeros(up)}, path)
        with pytest.raises(CheckpointError, match=r"has shape \(4, 48\) and .* which are no \(rank, in\)"):
            inspect_lora(path)


def test_the_part_for_the_text_encoder_is_looked_at_too(tmp_path: Path) -> None:
    path = trained(tmp_path / "a.safetensors", "lumina")
    chosen = options("lumina", network_weights=path, network_train_text_encoder=True)
    with pytest.raises(CheckpointError, match="has nothing for the text encoder, which is trained"):
        check_network(chosen)
    of_text = {"lora_te_x.lora_down.weight": torch.zeros(8, 4), "lora_te_x.lora_up.weight": torch.zeros(4, 8)}
    save_file(load_file(path) | of_text, path)
    check_network(chosen)
    with pytest.raises(CheckpointError, match="'lora_te_x' has rank 8, but 4 is wanted"):
        check_layers(chosen, LAYERS["lumina"])
    save_file(of_text, path)
    with pytest.raises(CheckpointError, match="has nothing for the DiT"):
        check_network(chosen)
