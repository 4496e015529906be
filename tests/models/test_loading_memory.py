"""What loading takes of the computer's memory, whichever conversion is asked for."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.load import write_checkpoint
from benchmarks.step_lumina import SIZES

ROOT = Path(__file__).resolve().parents[2]
LOAD = """
import ctypes, sys
from pathlib import Path
import torch
from library.models.lumina2 import load_nextdit
from library.options.quant import QuantOptions

def mb(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

def load(device):
    quant = QuantOptions(base_quant=sys.argv[2], quantize_device="cpu")
    named = {"dtype": torch.bfloat16, "mmap": sys.argv[3] == "mmap", "quant": quant}
    return load_nextdit(Path(sys.argv[1]), device=torch.device(device), **named)

load("meta")  # imports what is needed
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = mb("VmRSS")
model = load("cpu")
print(mb("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("way", ["mmap", "read"])
@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_quantising_an_fp32_file_takes_hardly_more_than_the_file(tmp_path, scheme, way):
    """Its large weights are given back to the system as soon as they are quantised."""
    file = tmp_path / "m.safetensors"
    few = {"n_layers": 1, "n_noise_refiners": 1, "n_context_refiners": 1}
    write_checkpoint(file, dataclasses.replace(SIZES["mid"].params, ffn_dim=16384, **few), "fp32")
    command = [sys.executable, "-c", LOAD, str(file), scheme, way]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert float(output) < file.stat().st_size / 2**20 + 100
