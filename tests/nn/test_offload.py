"""Checkpoints in CPU memory compute what ordinary ones compute."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.nn.running.offload import offloaded_checkpoint

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, scale):
        hidden = nn.functional.dropout(torch.tanh(self.wide(x)), 0.3, training=self.training)
        return x + scale * self.narrow(hidden)


def gradients(run, device, needs_grad):
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(16) for _ in range(3)).to(device)
    x = torch.randn(5, 16, device=device, requires_grad=needs_grad)
    y = x
    for block in blocks:
        y = run(block, y)
    y.square().sum().backward()
    return [y, *(p.grad for p in blocks.parameters()), *([x.grad] if needs_grad else [])]


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_outputs_and_gradients_are_those_of_ordinary_checkpoints(device, needs_grad):
    def ordinary(block, x):
        return checkpoint(block, x, 0.5, use_reentrant=False)

    def offloaded(block, x):
        return offloaded_checkpoint(block, x, 0.5)

    wanted, found = (gradients(run, device, needs_grad) for run in (ordinary, offloaded))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.gpu
def test_the_gpu_does_not_hold_the_inputs_of_blocks():
    blocks = [Block(256).cuda() for _ in range(8)]

    def held(run):
        x = torch.randn(20000, 256, device="cuda", requires_grad=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = x
        for block in blocks:
            y = run(block, y)
        return torch.cuda.memory_allocated() - before

    ordinary = held(lambda block, x: checkpoint(block, x, 0.5, use_reentrant=False))
    offloaded = held(lambda block, x: offloaded_checkpoint(block, x, 0.5))
    one = 20000 * 256 * 4
    assert offloaded <= 1.5 * one < 7 * one < ordinary
