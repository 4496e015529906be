"""benchmarks/traffic.py: what is read, written and multiplied."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from benchmarks.step import FAMILIES
from benchmarks.traffic import Traffic, count_block, fused
from library.nn import kernels
from library.nn.layers import scaled_rms_norm
from library.nn.packing import Packing

NUMBERS = 8 * 96
with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def count(function, *inputs):
    with Traffic() as traffic:
        function(*inputs)
    return traffic.count()


def test_what_is_read_and_what_is_written():
    x, y, row = torch.randn(8, 96), torch.randn(8, 96), torch.randn(96)
    assert count(torch.add, x, y).by_name == {"add": 3 * 4 * NUMBERS}
    assert count(torch.mul, x, row.expand(8, 96)).by_name == {"mul": 4 * (2 * NUMBERS + 96)}
    assert count(torch.mul, x, x).by_name == {"mul": 2 * 4 * NUMBERS}  # one tensor is read once
    assert count(x.add_, y).by_name == {"add_": 3 * 4 * NUMBERS}  # x is read and written
    assert count(x.copy_, y).by_name == {"copy_": 2 * 4 * NUMBERS}
    assert count(lambda: torch.add(x, x, out=y)).by_name == {"add": 2 * 4 * NUMBERS}
    assert count(x.bfloat16).by_name == {"_to_copy": (4 + 2) * NUMBERS}
    assert count(lambda: x.t()[3:].view(93, 8)).bytes == 0


def test_wide_products_and_attention_are_arithmetic():
    x, weight, thin = torch.randn(128, 96), torch.randn(80, 96), torch.randn(16, 96)
    wide = count(F.linear, x, weight)
    assert wide.flops == 2 * 128 * 96 * 80 and wide.bytes == 0
    assert wide.wide_bytes == 4 * (128 * 96 + 96 * 80 + 128 * 80)
    assert count(F.linear, x, thin).by_name == {"mm": 4 * (128 * 96 + 96 * 16 + 128 * 16)}
    q, k, v = (torch.randn(1, 2, length, 32, requires_grad=True) for length in (70, 90, 90))
    both = count(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert both.flops == (2 + 5) * 2 * 2 * 70 * 90 * 32 and "mm" not in both.by_name


@with_triton
def test_a_kernel_of_triton_counts_and_is_not_run():
    x, gain = torch.full((4, 8), torch.nan), torch.ones(1, 8)
    packing = Packing.of((4,), torch.device("cpu"))
    with Traffic() as traffic, fused(traffic):
        scaled_rms_norm(x, gain, packing, 1e-5)
    # x, the gain, the result, a number a row, and where samples end
    assert traffic.count().by_name == {"_rms_forward": 4 * (32 + 8 + 32 + 4 + 2)}
    assert not kernels.uses_triton()


@with_triton
def test_a_block_of_ours_moves_less_than_the_reference_s(monkeypatch):
    family = FAMILIES["lumina"]
    monkeypatch.setitem(family.sizes, "full", family.sizes["nano"])
    ours, reference = (count_block(family, family.contestants[name], 128) for name in ("ours", "reference"))
    fewer = count_block(family, family.contestants["ours"], 128, triton=True)
    assert 0 < fewer.bytes < ours.bytes < reference.bytes
    assert fewer.flops == ours.flops > 0
