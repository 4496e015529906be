"""LoRA files: what is told from a header, what is refused, and the hashes that web UIs compare."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.core.errors import CheckpointError, StorageError
from networks.files import inspect_lora, save_network

NAME = "lora_unet_layers_0_attention_qkv"


def lora_state(rank: int = 4) -> dict[str, torch.Tensor]:
    return {
        f"{NAME}.lora_down.weight": torch.randn(rank, 12),
        f"{NAME}.lora_up.weight": torch.randn(20, rank),
        f"{NAME}.alpha": torch.tensor(2.0),
    }


def test_round_trip(tmp_path: Path) -> None:
    state, path = lora_state(), tmp_path / "new" / "lora.safetensors"
    save_network(path, state, {"ss_steps": "10", "modelspec.title": "a"})
    loaded = load_file(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())
    file = inspect_lora(path)
    assert file.ranks == {NAME: 4}
    assert file.metadata["ss_steps"] == "10" and file.metadata["modelspec.title"] == "a"
    assert file.read().keys() == state.keys()


def test_missing_alpha_means_the_rank(tmp_path: Path) -> None:
    state = lora_state(rank=4)
    del state[f"{NAME}.alpha"]
    save_file(state, tmp_path / "lora.safetensors")
    assert inspect_lora(tmp_path / "lora.safetensors").read()[f"{NAME}.alpha"] == 4.0


def test_hashes_are_those_of_the_additional_networks_extension(tmp_path: Path) -> None:
    state = lora_state() | {"lora_unet_x.lora_down.weight": torch.randn(64, 8192)}  # more than a MiB
    path = tmp_path / "lora.safetensors"
    save_network(path, state, {"ss_steps": "10", "modelspec.title": "a"})
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    stored = json.loads(content[8 : 8 + length])["__metadata__"]
    assert stored["sshs_model_hash"] == hashlib.sha256(content[8 + length :]).hexdigest()
    save_file(state, tmp_path / "plain.safetensors", {"ss_steps": "10"})
    plain = (tmp_path / "plain.safetensors").read_bytes()
    assert stored["sshs_legacy_hash"] == hashlib.sha256(plain[2**20 : 2**20 + 2**16]).hexdigest()[:8]


def test_hashes_do_not_change_with_the_title(tmp_path: Path) -> None:
    state, hashes = lora_state(), []
    for title in ("a", "a longer title"):
        save_network(tmp_path / "lora.safetensors", state, {"ss_steps": "10", "modelspec.title": title})
        with safe_open(tmp_path / "lora.safetensors", "pt") as file:
            hashes.append({k: v for k, v in file.metadata().items() if k.startswith("sshs_")})
    assert hashes[0] == hashes[1] and len(hashes[0]) == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["transformer.layers.0.attn.to_q.lora_A.weight"], "not complete"),
        (["transformer.x.lora_A.weight", "transformer.x.lora_magnitude_vector.weight"], "not complete"),
        (["lora_unet_layers_0.lokr_w1"], "not complete: 'lora_unet_layers_0' lacks its lokr_w2"),
        ([f"{NAME}.lora_down.weight", f"{NAME}.lora_up.weight", f"{NAME}.dora_scale"], r"shape \(4, 4\)"),
        ([f"{NAME}.lora_down.weight", f"{NAME}.lora_up.weight", "x.dora_scale"], "no part of a LoRA"),
        (["layers.0.attention.qkv.weight"], "not a LoRA.*layers.0.attention.qkv.weight"),
        ([f"{NAME}.lora_down.weight"], "not complete"),
        ([f"{NAME}.lora_down.weight", f"{NAME}.lora_up.weight", "x.bias"], "no part of a LoRA: x.bias"),
    ],
)
def test_other_files_are_named(tmp_path: Path, keys: list[str], message: str) -> None:
    path = tmp_path / "some.safetensors"
    save_file({key: torch.zeros(4, 4) for key in keys}, path)
    with pytest.raises(CheckpointError, match=f"some.safetensors.*{message}"):
        inspect_lora(path)


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere.safetensors"):
        inspect_lora(tmp_path / "nowhere.safetensors")
    path = tmp_path / "cut.safetensors"
    save_network(path, lora_state(), {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut.safetensors"):
        inspect_lora(path)


def test_failing_to_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        save_network(tmp_path / "file" / "lora.safetensors", lora_state(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_can_be_imported_without_torch() -> None:
    modules = "networks.lora_lumina, networks.lora_kandinsky5, networks.module, tools.convert_lora"
    check = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[2]).returncode == 0
