"""Eval mode, and a network that is off: for a while, also where that ends in a failure."""

from __future__ import annotations

import pytest
from torch import nn

from library.training.modes import eval_mode, switched_off
from networks.lora import LoRANetwork, LoRASize


def test_each_part_has_its_own_mode_again() -> None:
    net = nn.Sequential(nn.Dropout(), nn.Dropout())
    net[1].eval()
    with pytest.raises(RuntimeError), eval_mode([net]):
        assert not net.training and not net[0].training and not net[1].training
        raise RuntimeError
    assert net.training and net[0].training and not net[1].training


def test_a_network_that_was_off_is_on_again() -> None:
    network = LoRANetwork(nn.Sequential(nn.Linear(4, 4)), {"0": LoRASize(2, 2.0)})
    with pytest.raises(RuntimeError), switched_off(network):
        assert not network.enabled
        raise RuntimeError
    assert network.enabled
