"""Nano checkpoints in every layout, and weight files written by hand."""

import json
import math
import struct
from functools import cache

import pytest

from tools.make_nano_models import make_nano_models


@pytest.fixture(scope="session")
def nano_in(tmp_path_factory):
    """Return a function: layout -> paths of the nano checkpoints in that layout, made once."""
    return cache(lambda layout: make_nano_models(tmp_path_factory.mktemp(f"nano_{layout}"), 0, layout))


@pytest.fixture
def ordered_file():
    """Return a function that writes fp32 tensors as safetensors in exactly the order of a dict."""

    def write(path, tensors):
        header, data = {}, b""
        for name, tensor in tensors.items():
            content = tensor.contiguous().numpy().tobytes()
            place = [len(data), len(data) + len(content)]
            dtype = "F32" if tensor.is_floating_point() else "U8"
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": place}
            data += content
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        return path

    return write


@pytest.fixture
def hollow_file():
    """Return a function that writes a bf16 safetensors file of any size with nothing but a hole for data."""

    def write(path, shapes):
        header, end = {}, 0
        for name, shape in shapes.items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        with path.open("r+b") as handle:
            handle.truncate(8 + len(text) + end)
        return path

    return write
