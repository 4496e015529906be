"""A NextDiT whose blocks are swapped trains and draws as one whose blocks stay, whatever backward keeps."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from library.core.errors import ConfigError
from library.models.lumina2 import load_nextdit
from library.nn.running.runner import MODES
from library.nn.swap.block_swap import BlockSwap
from library.options.swap import SwapOptions
from networks.lora import LoRANetwork, merge
from networks.lora_lumina import create_network
from networks.request import NetworkRequest
from tests.strict_copier import StrictCopier

CPU = torch.device("cpu")


def load(nano, dtype=torch.float32, **options):
    return load_nextdit(nano.dit, device=CPU, dtype=dtype, swap=SwapOptions(**options))


def train(model, args, mode, steps=2):
    """Outputs, gradients and trained weights of some steps, and a picture after each."""
    network: LoRANetwork = create_network(model, NetworkRequest(dim=4, alpha=4, args=args, seed=3))
    network.apply_to(model)
    network.train()
    model.runner.keep(mode)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    random, found = torch.Generator().manual_seed(0), []
    width = model.params.cap_feat_dim
    for _ in range(steps):
        x = [torch.randn(16, *size, generator=random) for size in ((4, 6), (8, 8))]
        captions = [torch.randn(length, width, generator=random) for length in (5, 9)]
        t = torch.rand(2, generator=random)
        output = model(x, t, captions)
        sum(part.float().square().mean() for part in output).backward()
        found += output
        found += [p.grad.clone() for p in network.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            found += model(x[:1], t[:1], captions[:1])
    return [*found, *network.parameters()]


NETWORKS = {
    "everything": {"embedder_dims": "[2,2,2]"},
    "late layers only": {"train_blocks": "transformer", "block_dims": "0,0,0,4"},
}


CASES = [(mode, "everything", torch.bfloat16, 6, 2) for mode in MODES]
CASES += [("none", "everything", torch.float32, 3, 1), ("full", "everything", torch.float32, 6, 3)]
CASES += [
    ("none", "late layers only", torch.float32, 6, 2),
    ("full", "late layers only", torch.float32, 4, 2),
]


@pytest.mark.parametrize(("mode", "args", "dtype", "count", "ring_size"), CASES)
def test_swapping_changes_no_bit(nano, mode, args, dtype, count, ring_size):
    wanted = train(load(nano, dtype), NETWORKS[args], mode)
    model = load(nano, dtype, blocks_to_swap=count, block_swap_ring_size=ring_size)
    copier = model.runner.ring.copier = StrictCopier()
    found = train(model, NETWORKS[args], mode)
    assert len(copier.rooms) == ring_size and len(copier.asked) > count
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_loader_makes_the_ring(nano):
    assert load(nano).runner.ring is None
    model = load(nano, blocks_to_swap=2)
    assert isinstance(model.runner.ring, BlockSwap)
    stored = load_file(nano.dit)["layers.3.attention.qkv.weight"]
    assert torch.equal(model.layers[3].attention.qkv.weight, stored)
    with pytest.raises(ConfigError, match="--blocks_to_swap is 7, but the model has 6 blocks"):
        load(nano, blocks_to_swap=7)


def test_on_the_meta_device_nothing_is_swapped(nano):
    swap = SwapOptions(blocks_to_swap=6)
    model = load_nextdit(nano.dit, device=torch.device("meta"), dtype=torch.float32, swap=swap)
    assert model.runner.ring is None
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_merging_reaches_swapped_blocks(nano):
    plain, swapped = load(nano), load(nano, blocks_to_swap=6)
    swapped.runner.ring.copier = StrictCopier()
    outputs = []
    for model in (plain, swapped):
        network = create_network(model, NetworkRequest(dim=2, alpha=2, seed=1))
        for lora in network.loras.values():
            lora.up.data.fill_(0.01)
        merge(model, [network])
        random = torch.Generator().manual_seed(0)
        x, caption = torch.randn(16, 4, 4, generator=random), torch.randn(3, model.params.cap_feat_dim)
        with torch.no_grad():
            outputs.append(model([x], torch.tensor([0.5]), [caption.fill_(0.3)])[0])
    assert torch.equal(*outputs)
    assert outputs[0].isfinite().all()
