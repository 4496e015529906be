"""Tensors out of safetensors files: every dtype, in pieces, by several threads, with little memory."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.core.checkpoint_files import open_checkpoint
from library.core.errors import CheckpointError
from library.nn.weights import reader as tensor_reader
from library.nn.weights.reader import TensorReader

CPU = torch.device("cpu")
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


@pytest.fixture(params=[7, tensor_reader.PIECE_BYTES], ids=["tiny pieces", "whole"])
def pieces(request, monkeypatch):
    """Pieces that do not divide the tensors, so that seams and the last short piece are seen."""
    monkeypatch.setattr(tensor_reader, "PIECE_BYTES", 8 * request.param)


def stored(folder, **tensors):
    save_file(tensors, folder / "m.safetensors")
    return open_checkpoint(folder / "m.safetensors")


def read(checkpoint, *names, mmap=True, **wanted):
    with TensorReader(checkpoint.files, mmap=mmap) as reader:
        return reader.read([checkpoint.tensors[name] for name in names], **({"device": CPU} | wanted))


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype, mmap):
    x = torch.randn(5, 3).mul(9).to(dtype)
    y = read(stored(tmp_path, x=x, before=torch.ones(3)), "x", mmap=mmap)
    assert y.dtype == dtype
    assert torch.equal(y.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES[:6], ids=str)
def test_conversion_is_that_of_torch(tmp_path, pieces, dtype, wanted):
    x = torch.randn(31, 9).to(dtype)
    y = read(stored(tmp_path, x=x), "x", dtype=wanted)
    assert torch.equal(y, x.to(wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_joined_in_order(tmp_path, pieces, dtype):
    parts = {name: torch.randn(rows, 4) for name, rows in (("q", 3), ("k", 1), ("v", 2))}
    y = read(stored(tmp_path, **parts), "q", "k", "v", dtype=dtype)
    assert torch.equal(y, torch.cat(list(parts.values())).to(dtype))


@pytest.mark.parametrize("x", [torch.tensor(2.5), torch.zeros(0, 3)], ids=["scalar", "empty"])
def test_scalars_and_empty_tensors(tmp_path, x):
    checkpoint = stored(tmp_path, x=x)
    for wanted in (torch.float32, torch.float64):
        assert torch.equal(read(checkpoint, "x", dtype=wanted, mmap=False), x.to(wanted))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (5, 1)], ids=str)
@pytest.mark.parametrize("wanted", [None, torch.bfloat16, torch.float32, torch.float16])
def test_scaled_numbers_are_rounded_once(tmp_path, pieces, wanted, shape):
    x, scale = torch.randn(5, 9).mul(100).to(torch.float8_e4m3fn), torch.rand(shape) + 0.01
    checkpoint = stored(tmp_path, **{"x.weight": x, "x.scale_weight": scale, "y.weight": x.clone()})
    expected = (x.float() * scale.view(-1, 1)).to(wanted or torch.bfloat16)
    for mmap in (True, False):
        assert torch.equal(read(checkpoint, "x.weight", dtype=wanted, mmap=mmap), expected)
    joined = read(checkpoint, "y.weight", "x.weight", dtype=wanted)
    assert torch.equal(joined, torch.cat([x.to(expected.dtype), expected]))


def test_meta_tensors_need_no_reading(tmp_path):
    y = read(stored(tmp_path, x=torch.ones(2, 3)), "x", device=torch.device("meta"), dtype=torch.bfloat16)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3), torch.bfloat16)


def test_threads_do_not_get_into_each_others_way(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_reader, "PIECE_BYTES", 64)
    tensors = {f"x{number}": torch.randn(50, 7) for number in range(40)}
    checkpoint = stored(tmp_path, **tensors)
    with TensorReader(checkpoint.files) as reader, ThreadPoolExecutor(4) as pool:
        for dtype in (torch.float32, torch.bfloat16):

            def one(name, dtype=dtype):
                return reader.read([checkpoint.tensors[name]], device=CPU, dtype=dtype)

            for name, y in zip(tensors, pool.map(one, tensors), strict=True):
                assert torch.equal(y, tensors[name].to(dtype))


@pytest.mark.parametrize("start", range(4))
def test_numbers_may_begin_anywhere_in_the_file(tmp_path, start):
    """A header of any length is allowed, and a piece cannot be mapped as numbers that begin in between."""
    x = torch.randn(50, 3)
    file = tmp_path / "m.safetensors"
    entry = {"dtype": "F32", "shape": [50, 3], "data_offsets": [0, 600]}
    header = json.dumps({"x": entry}).encode()
    header += b" " * (-len(header) % 8 + start)
    file.write_bytes(len(header).to_bytes(8, "little") + header + x.numpy().tobytes())
    assert torch.equal(read(open_checkpoint(file), "x", dtype=torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as it is", "converted"])
def test_a_file_that_was_cut_meanwhile_is_named(tmp_path, dtype, mmap):
    if mmap and dtype == torch.float32:
        pytest.skip("the system ends a process that looks at what was cut off a mapped file")
    checkpoint = stored(tmp_path, x=torch.ones(50, 50))
    with TensorReader(checkpoint.files, mmap=mmap) as reader:
        (file,) = checkpoint.files
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"m.safetensors ends in the middle of 'x'"):
            reader.read([checkpoint.tensors["x"]], device=CPU, dtype=dtype)


def test_a_file_that_has_gone_is_named(tmp_path):
    checkpoint = stored(tmp_path, x=torch.ones(2))
    checkpoint.files[0].unlink()
    with pytest.raises(CheckpointError, match="m.safetensors cannot be read any more"):
        read(checkpoint, "x")


PEAK = """
import ctypes
import sys
from pathlib import Path
import torch
from torch import nn
from library.core.checkpoint_files import open_checkpoint
from library.nn.weights.loading import Source, load_module

def mb(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

checkpoint = open_checkpoint(Path(sys.argv[1]))
sources = {name: Source((name,)) for name in checkpoint.tensors}

def load(dtype, mmap):
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1024, 4096, bias=False) for _ in range(12)))
    load_module(model, checkpoint, sources, device=torch.device("cpu"), dtype=dtype, mmap=mmap)
    return model

load(torch.float16, True)  # threads, and what torch sets up on first use
for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32):
    for mmap in (True, False):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = mb("VmRSS")
        model = load(dtype, mmap)
        print(dtype.itemsize, mb("VmHWM") - before)
        assert all(weight[0, 0] == weight[-1, -1] == 0.5 for weight in model.parameters())
        del model
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_peak_memory_is_the_result_and_little_more(tmp_path):
    """The file has 192 MB of fp32: a second copy of it, or of a tensor for each thread, would show."""
    file = tmp_path / "m.safetensors"
    save_file({f"{number}.weight": torch.full((4096, 1024), 0.5) for number in range(12)}, file)
    command = [sys.executable, "-c", PEAK, str(file)]
    root = Path(__file__).resolve().parents[2]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    lines = [line.split() for line in output.splitlines()]
    assert len(lines) == 6
    for itemsize, peak in lines:
        assert float(peak) < 48 * int(itemsize) + 8 * tensor_reader.READERS + 12, output
