"""`--network_*` and `--metadata_*`: mistakes are named before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.core.errors import CheckpointError, ConfigError
from library.options.group import parse_options
from library.options.network import MetadataOptions, NetworkOptions
from networks.module import check_network, load_network_module


@dataclass(frozen=True)
class Options:
    network: NetworkOptions
    metadata: MetadataOptions


def parse(*words: str) -> Options:
    return parse_options(Options, ["--network_module=networks.lora_lumina", *words])


def test_defaults_are_the_references() -> None:
    network = parse().network
    assert (network.network_dim, network.network_alpha, network.network_dropout) == (4, 1.0, None)
    assert network.args_by_key() == {}


def test_args_are_texts_by_key() -> None:
    network = parse("--network_args", "attn_dim=4", "embedder_dims=[4,4,4]", "note=a=b").network
    assert network.args_by_key() == {"attn_dim": "4", "embedder_dims": "[4,4,4]", "note": "a=b"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--network_dim=0"], "--network_dim is 0; a rank must be 1 or more"),
        (["--network_dim=-4"], "--network_dim is -4"),
        (["--network_alpha=-1"], "--network_alpha is -1"),
        (["--network_alpha=nan"], "--network_alpha is nan"),
        (["--network_dropout=1"], "--network_dropout is 1"),
        (["--network_args", "attn_dim"], "'attn_dim' must be written key=value"),
        (["--network_args", "a=1", "a=2"], "has 'a' twice"),
        (["--metadata_thumbnail=nowhere.png"], "nowhere.png is neither a file"),
        (["--metadata_is_negative_embedding=maybe"], "invalid choice"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*words)


def test_check_names_unknown_modules_and_arguments(tmp_path: Path) -> None:
    check_network(parse("--network_args", "attn_dim=4").network)
    with pytest.raises(ConfigError, match="did you mean 'attn_dim'"):
        check_network(parse("--network_args", "attn_dims=4").network)
    with pytest.raises(ConfigError, match="no module 'networks.lora_sdxl'; there is networks.lora_lumina"):
        load_network_module("networks.lora_sdxl")
    with pytest.raises(ConfigError, match="use --network_module lycoris.kohya --network_args algo=lokr"):
        load_network_module("networks.lokr")
    with pytest.raises(ConfigError, match="json is not a module for networks"):
        load_network_module("json")


def test_check_looks_at_the_start_weights(tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    with pytest.raises(CheckpointError, match="start.safetensors"):
        check_network(parse(f"--network_weights={path}").network)
    save_file({"layers.0.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match="not a LoRA"):
        check_network(parse(f"--network_weights={path}").network)
