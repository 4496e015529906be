"""benchmarks/dispatch.py: what counts as a kernel, and that it leaves torch and the library as they were."""

import torch
import torch.nn.functional as F

from benchmarks.dispatch import Kernels, Turn, as_on_a_gpu
from benchmarks.step import FAMILIES
from benchmarks.step_parts import Settings
from library.nn import products, stand_in


def test_views_and_fresh_memory_are_no_kernels():
    with Kernels() as kernels:
        x = torch.empty(4, 6).fill_(1.0)
        y = x.t().reshape(2, 12)[:, 3:].unsqueeze(0)
        (y * 2).view(-1).add_(1)
    assert kernels.by_name == {"fill_": 1, "mul": 1, "add_": 1, "clone": 1}  # reshape had to copy


def test_an_rms_norm_is_one_kernel_each_way_as_on_a_gpu():
    x = torch.randn(3, 8, requires_grad=True)
    before = F.rms_norm
    with as_on_a_gpu(), Kernels() as kernels:
        y = stand_in.rms_norm(x, 1e-6)
        assert kernels.by_name.total() == 1
        y.backward(torch.ones_like(y))
        assert products.device_kind(x) == "cuda"
    assert kernels.by_name["native_layer_norm_backward"] == 1
    assert F.rms_norm is before and products.device_kind(x) == "cpu"


def test_ours_asks_for_fewer_kernels_than_the_reference():
    settings = Settings(FAMILIES["lumina"], "tiny", torch.bfloat16, 1, torch.device("cpu"), False)
    family, counts = settings.family, {}
    with as_on_a_gpu():
        for name in ("ours", "reference"):
            turn = Turn(family.contestants[name](settings), family.work(settings), None)
            turn.count()
            counts[name] = turn.kernels
    for ours, reference in zip(counts["ours"], counts["reference"], strict=True):  # forward, backward
        assert 0 < ours < reference
