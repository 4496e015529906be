"""Headers of weight files: what is there, and clear words for what is not."""

import json

import pytest
import torch
from safetensors.torch import save_file

from library.core.checkpoint_files import open_checkpoint
from library.core.errors import CheckpointError


def make(path, **tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"made_by": "test"})
    return path


def test_single_file(tmp_path):
    checkpoint = open_checkpoint(make(tmp_path / "m.safetensors", a=torch.zeros(2, 3)))
    assert checkpoint.shape("a") == (2, 3)
    assert checkpoint.tensors["a"].dtype == "F32"
    assert checkpoint.metadata["made_by"] == "test"


def test_shards_by_index_by_folder_and_by_subfolder(tmp_path):
    folder = tmp_path / "transformer"
    make(folder / "m-00001-of-00002.safetensors", a=torch.zeros(1))
    make(folder / "m-00002-of-00002.safetensors", b=torch.zeros(1))
    index = folder / "m.safetensors.index.json"
    weight_map = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"hidden_size": 8}')
    for path in (index, folder, tmp_path):
        checkpoint = open_checkpoint(path, subfolder="transformer")
        assert sorted(checkpoint.tensors) == ["a", "b"]
        assert checkpoint.config == {"hidden_size": 8}


def test_missing_shard_is_named(tmp_path):
    (tmp_path / "m.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"lists files that are not there: gone\.safetensors"):
        open_checkpoint(tmp_path)


def test_truncated_file(tmp_path):
    path = make(tmp_path / "m.safetensors", a=torch.zeros(100))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"m\.safetensors is not a complete .*truncated"):
        open_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"\x80\x02pickle", b"\x00" * 64])
def test_foreign_content(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        open_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin"])
def test_pickled_files_are_refused_unopened(tmp_path, ending):
    (tmp_path / f"m{ending}").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="can run code when loaded"):
        open_checkpoint(tmp_path / f"m{ending}")


def test_nothing_there_and_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="There is no weight file or folder"):
        open_checkpoint(tmp_path / "no.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("spelt", ["scale_weight", "weight_scale"])
def test_scales_of_fp8_go_with_their_weights(tmp_path, spelt):
    weight = torch.zeros(3, 2).to(torch.float8_e4m3fn)
    beside = {"scaled_fp8": torch.zeros(0), "a.scale_input": torch.ones(()), "a.comfy_quant": torch.zeros(9)}
    make(tmp_path / "m-1-of-2.safetensors", **{"a.weight": weight, "a.bias": torch.zeros(3)}, **beside)
    make(tmp_path / "m-2-of-2.safetensors", **{f"a.{spelt}": torch.ones(1)})
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == {"a.weight", "a.bias"}
    assert checkpoint.tensors["a.weight"].scale.name == f"a.{spelt}"
    assert [file.name for file in checkpoint.files] == ["m-1-of-2.safetensors", "m-2-of-2.safetensors"]


@pytest.mark.parametrize(
    ("weight", "scale", "words"),
    [
        (torch.zeros(3, 2), torch.ones(()), r"belongs to a weight \(3, 2\) in F32"),
        (torch.zeros(3, 2, dtype=torch.int8), torch.ones(3), "in I8"),
        (torch.zeros(3, 2).to(torch.float8_e4m3fn), torch.ones(2), r"of shape \(2,\) belongs .* in F8_E4M3"),
        (None, torch.ones(()), "belongs to no weight"),
    ],
)
def test_scales_of_another_kind_are_refused(tmp_path, weight, scale, words):
    tensors = {"a.weight": weight, "a.weight_scale": scale}
    path = make(tmp_path / "m.safetensors", **{n: t for n, t in tensors.items() if t is not None})
    with pytest.raises(CheckpointError, match=f"'a.weight_scale' .*{words}.*take a file in bf16"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("path", "advised"),
    [("Alpha-VLLM/Lumina-Image-2.0", True), ("a/b.gguf", False), ("~/model", False), ("model", False)],
)
def test_what_looks_like_a_repository_is_answered_with_how_to_fetch_it(path: str, advised: bool) -> None:
    with pytest.raises(CheckpointError, match="There is no weight file or folder") as told:
        open_checkpoint(path)
    assert ("hf download" in str(told.value)) == advised
