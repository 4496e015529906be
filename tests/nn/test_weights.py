"""Weights from files into a module on the meta device."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from library.core.checkpoint_files import open_checkpoint
from library.core.errors import CheckpointError
from library.nn.weights.loading import Source, load_module

CPU = torch.device("cpu")
SOURCES = {"weight": Source(("q", "k")), "bias": Source(("bias",))}


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    tensors = {"q": torch.randn(2, 3), "k": torch.randn(1, 3), "bias": torch.randn(3)}
    save_file(tensors, tmp_path / "m.safetensors")
    return open_checkpoint(tmp_path / "m.safetensors"), tensors


def meta_linear(rows=3):
    with torch.device("meta"):
        return nn.Linear(3, rows)


def test_parts_are_joined_and_frozen(checkpoint):
    files, tensors = checkpoint
    module = meta_linear()
    load_module(module, files, SOURCES, device=CPU)
    assert torch.equal(module.weight, torch.cat([tensors["q"], tensors["k"]]))
    assert not module.weight.requires_grad


def test_dtype_rule_by_name(checkpoint):
    module = meta_linear()
    rule = {"weight": torch.bfloat16, "bias": None}
    load_module(module, checkpoint[0], SOURCES, device=CPU, dtype=rule.get)
    assert (module.weight.dtype, module.bias.dtype) == (torch.bfloat16, torch.float32)


def test_missing_tensor_is_named_with_its_neighbour(checkpoint):
    with pytest.raises(CheckpointError, match="lacks 1 tensors .*: biass; did you mean 'bias'?"):
        load_module(meta_linear(), checkpoint[0], SOURCES | {"bias": Source(("biass",))}, device=CPU)


def test_wrong_shape_gives_both_shapes(checkpoint):
    with pytest.raises(CheckpointError, match=r"shape \(3, 3\), but the model needs \(4, 3\)"):
        load_module(meta_linear(4), checkpoint[0], SOURCES, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_plain_reading_gives_the_same_tensors_as_mapping(tmp_path, dtype):
    tensors = {"q": torch.arange(6).view(2, 3).to(dtype), "k": torch.ones(1, 3).to(dtype)}
    tensors["bias"] = torch.tensor([1.0, 2.0, 3.0])
    save_file(tensors, tmp_path / "m.safetensors")
    files = open_checkpoint(tmp_path / "m.safetensors")
    modules = [meta_linear(), meta_linear()]
    for module, mmap in zip(modules, (True, False), strict=True):
        load_module(module, files, SOURCES, device=CPU, dtype=torch.float32, mmap=mmap)
    assert torch.equal(modules[0].weight, modules[1].weight)
    assert torch.equal(modules[1].bias, tensors["bias"])
