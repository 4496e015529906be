"""Blocks whose weights come and go compute what blocks compute whose weights stay."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.core.errors import ConfigError, ResourceError
from library.nn.swap import swapped_weights
from library.nn.swap.block_swap import BlockSwap, chosen_blocks, device_of_weights, spread
from library.nn.weights.quant import QuantLinear
from library.options.swap import SwapOptions
from tests.strict_copier import POISON, StrictCopier
from tests.warm_gpu import warm_gpu

CPU, WIDTH = torch.device("cpu"), 12


class Block(nn.Module):
    """Frozen weights, a gain, a buffer; `lora` is trained. The first block knows a wider hidden layer."""

    def __init__(self, hidden):
        super().__init__()
        self.wide = nn.Linear(WIDTH, hidden)
        self.narrow = nn.Linear(hidden, WIDTH, dtype=torch.bfloat16)
        self.gain = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("shift", torch.randn(WIDTH))
        self.requires_grad_(False)
        self.lora = None

    def forward(self, x):
        hidden = torch.tanh(self.wide(x * self.gain + self.shift))
        if self.lora is not None:
            hidden = hidden + x @ self.lora
        return x + self.narrow(hidden.to(torch.bfloat16)).float().mul(self.gain)


def make_blocks(count, device=CPU):
    torch.manual_seed(0)
    return [Block(24 if n == 0 else 16).to(device) for n in range(count)]


def train_some(blocks):
    """Give every second block weights to train, as a LoRA would be put on it."""
    torch.manual_seed(1)
    for block in blocks[::2]:
        block.lora = nn.Parameter(
            torch.randn(WIDTH, block.wide.out_features, device=block.wide.weight.device)
        )


def run_plain(ring, block, x):
    ring.hold(block)
    with ring.saved_tensors(block):
        return block(x)


def run_checkpointed(ring, block, x):
    def held(x):
        ring.hold(block)
        return block(x)

    return checkpoint(held, x, use_reentrant=False)


class NoRing:
    """What takes the place of a ring without swapping."""

    def hold(self, block):
        pass

    def saved_tensors(self, block):
        return torch.enable_grad()


def train(blocks, ring, run, *, steps=3, previews=False):
    """Outputs and gradients of some steps."""
    found = []
    device = blocks[0].shift.device if isinstance(ring, NoRing) else ring.device
    for step in range(steps):
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(step)).to(device)
        y = x
        for block in blocks:
            y = run(ring, block, y)
        y.square().sum().backward()
        found += [y.detach().clone(), *(block.lora.grad.clone() for block in blocks[::2])]
        if previews:
            with torch.no_grad():
                for _ in range(2):
                    for block in blocks:
                        ring.hold(block)
                        x = block(x)
            found.append(x)
    return found


def alike(found, wanted):
    assert len(found) == len(wanted)
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


MODES = {
    "plain": run_plain,
    "checkpointed": run_checkpointed,
    "mixed": lambda ring, block, x: (run_plain if block.lora is None else run_checkpointed)(ring, block, x),
}


@pytest.mark.parametrize("previews", [False, True], ids=["training", "with previews"])
@pytest.mark.parametrize("swapped", ["all", "some", "one"])
@pytest.mark.parametrize("ring_size", [1, 2, 3, 9])
@pytest.mark.parametrize("mode", MODES)
def test_swapping_changes_no_bit(mode, ring_size, swapped, previews):
    blocks, same = make_blocks(6), make_blocks(6)
    train_some(same)
    wanted = train(same, NoRing(), MODES[mode], previews=previews)
    copier = StrictCopier()
    chosen = {"all": blocks, "some": blocks[1::2], "one": blocks[2:3]}[swapped]
    ring = BlockSwap(chosen, CPU, ring_size=ring_size, copier=copier)
    train_some(blocks)
    assert alike(train(blocks, ring, MODES[mode], previews=previews), wanted)
    assert len(copier.rooms) == min(ring_size, len(chosen))


def test_the_double_shows_weights_that_are_not_there_yet_or_no_longer():
    blocks, copier = make_blocks(4)[1:], StrictCopier()
    ring = BlockSwap(blocks, CPU, copier=copier)
    ring.hold(blocks[0])
    stale = blocks[0].wide.weight.data
    assert stale.isfinite().all()
    ring.hold(blocks[1])
    assert not stale.isfinite().any()
    copier.await_copies = lambda copied: None
    ring.hold(blocks[2])
    assert not blocks[2](torch.ones(2, WIDTH)).isfinite().any()


@pytest.mark.parametrize("ring_size", [2, 3, 4])
@pytest.mark.parametrize("mode", ["plain", "checkpointed"])
def test_copies_are_ahead_and_nothing_is_copied_twice(mode, ring_size):
    count = 7
    blocks, copier = make_blocks(count), StrictCopier()
    ring = BlockSwap(blocks, CPU, ring_size=ring_size, copier=copier)
    train_some(blocks)
    train(blocks, ring, MODES[mode], steps=2)
    asked, late = len(copier.asked), copier.late
    assert late <= 2  # the first block of all, and the way has to be learnt at the turns
    train(blocks, ring, MODES[mode], steps=3)
    assert copier.late == late
    # At each turn the ring's blocks are there already.
    assert len(copier.asked) - asked == 3 * 2 * (count - ring_size)


def test_a_backward_that_ends_early_and_pictures_in_between_are_foreseen():
    blocks, copier = make_blocks(8), StrictCopier()
    ring = BlockSwap(blocks, CPU, copier=copier)
    for block in blocks[4:]:
        block.lora = nn.Parameter(torch.randn(WIDTH, block.wide.out_features))

    def step():
        y = torch.randn(3, WIDTH)
        for block in blocks:
            y = run_checkpointed(ring, block, y)
        y.sum().backward()

    def picture():
        for block in blocks:
            ring.hold(block)

    for _ in range(2):
        step()
    before = copier.late
    for _ in range(3):
        step()
    assert copier.late == before
    for _ in range(2):
        picture()
    before = copier.late
    picture()
    assert copier.late == before


def test_a_copy_that_fails_can_be_asked_for_again():
    blocks, same, copier = make_blocks(4), make_blocks(4), StrictCopier()
    ring = BlockSwap(blocks, CPU, copier=copier)
    ring.hold(blocks[0])
    works = copier.copy
    for failing in (1, 2):
        calls = itertools.count(1)

        def copy(pairs, after, calls=calls, failing=failing):
            if next(calls) == failing:
                raise torch.OutOfMemoryError("no")
            return works(pairs, after)

        copier.copy = copy
        with pytest.raises(torch.OutOfMemoryError):
            ring.hold(blocks[2])
            ring.hold(blocks[0])
        copier.copy = works
        x = torch.ones(2, WIDTH)
        for block, other in zip(blocks, same, strict=True):
            ring.hold(block)
            assert torch.equal(block(x), other(x))


def test_the_masters_are_what_a_block_has_out_of_its_turn():
    blocks, same = make_blocks(4), make_blocks(4)
    ring = BlockSwap(blocks, CPU, copier=StrictCopier())
    addresses = [block.wide.weight.data_ptr() for block in blocks]
    for block in [*blocks, *reversed(blocks), *blocks]:
        ring.hold(block)
    assert [block.wide.weight.data_ptr() for block in blocks[:2]] == addresses[:2]
    assert [block.wide.weight.data_ptr() for block in blocks[2:]] != addresses[2:]
    assert all(
        torch.equal(a, b)
        for block, other in zip(blocks[:2], same[:2], strict=True)
        for a, b in zip(block.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_weights_merged_before_the_first_use_count():
    blocks = make_blocks(3)
    ring = BlockSwap(blocks, CPU, ring_size=1, copier=StrictCopier())
    merged = nn.Parameter(torch.ones_like(blocks[1].wide.weight), requires_grad=False)
    blocks[1].wide.weight = merged
    for block in (*blocks, blocks[1]):
        ring.hold(block)
    assert torch.equal(blocks[1].wide.weight, torch.ones_like(merged))


def test_what_is_put_on_a_block_later_stays_where_it_is():
    blocks = make_blocks(3)
    ring = BlockSwap(blocks, CPU, copier=StrictCopier())
    train_some(blocks)
    blocks[0].register_buffer("alpha", torch.ones(1))
    addresses = [blocks[0].lora.data_ptr(), blocks[0].alpha.data_ptr()]
    for block in blocks:
        ring.hold(block)
        assert [blocks[0].lora.data_ptr(), blocks[0].alpha.data_ptr()] == addresses


def test_blocks_that_are_not_swapped_are_left_alone():
    blocks, copier = make_blocks(3), StrictCopier()
    ring = BlockSwap(blocks[:2], CPU, copier=copier)
    ring.hold(blocks[2])
    assert not copier.rooms
    with ring.saved_tensors(blocks[2]):
        assert blocks[2](torch.ones(1, WIDTH)).isfinite().all()


@pytest.mark.parametrize("ring_size", [1, 2, 9])
def test_a_model_that_was_away_computes_the_same(ring_size):
    model, same, copier = nn.ModuleList(make_blocks(6)), make_blocks(6), StrictCopier()
    ring = BlockSwap(model[1::2], CPU, ring_size=ring_size, copier=copier)
    x = torch.ones(2, WIDTH)
    for held in (6, 3, 6):  # it leaves in the middle too, with copies on their way
        y = z = x
        for block, other in zip(model[:held], same[:held], strict=True):
            ring.hold(block)
            y, z = block(y), other(z)
        assert torch.equal(y, z)
        ring.move_others(model, "cpu")
        for room in copier.rooms:
            room.fill_(POISON)  # as whoever takes their memory will
        assert all(torch.equal(a.wide.weight, b.wide.weight) for a, b in zip(model, same, strict=True))
    ring.move_others(model, torch.float64)  # tells what moves as well as another device would
    assert [block.wide.weight.dtype for block in model] == [torch.float64, torch.float32] * 3


def test_master_copies_in_one_piece(monkeypatch):
    """As with page-locked memory, of which this test takes none."""
    pieces = []

    def memory(size):
        pieces.append(torch.full((size,), POISON, dtype=torch.uint8))
        return pieces[-1]

    monkeypatch.setattr(swapped_weights, "_locked", memory)
    blocks, same, copier = make_blocks(6), make_blocks(6), StrictCopier()
    train_some(same)
    ring = BlockSwap(blocks, CPU, pinned=True, copier=copier)
    train_some(blocks)
    assert alike(train(blocks, ring, run_plain), train(same, NoRing(), run_plain))
    assert all(len(pairs) == 1 for pairs, _ in copier.asked)
    inside = [
        piece.data_ptr() <= blocks[0].gain.data_ptr() < piece.data_ptr() + len(piece) for piece in pieces
    ]
    assert sum(inside) == 1 or blocks[0].gain.data_ptr() in range(
        copier.rooms[0].data_ptr(), copier.rooms[0].data_ptr() + len(copier.rooms[0])
    )


class QuantBlock(Block):
    """A block whose wide layer is kept in few bits: its weights are buffers."""

    def __init__(self, hidden, scheme):
        super().__init__(hidden)
        self.wide = QuantLinear(WIDTH, hidden, True, scheme)
        self.wide.bias.data.normal_()
        self.wide.quantise(torch.randn(hidden, WIDTH), CPU)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_quantised_weights(scheme):
    def make():
        torch.manual_seed(0)
        return [QuantBlock(16, scheme) for _ in range(5)]

    blocks, same = make(), make()
    ring = BlockSwap(blocks, CPU, copier=StrictCopier())
    found = []
    for chosen, order in ((same, NoRing()), (blocks, ring)):
        x = torch.ones(3, WIDTH, requires_grad=True)
        y = x
        for block in chosen:
            y = run_plain(order, block, y)
        y.square().sum().backward()
        found.append([y.detach(), x.grad])
    assert alike(*found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is page-locked memory")
def test_page_locked_memory_that_cannot_be_had():
    blocks = make_blocks(2)
    ring = BlockSwap(blocks, CPU, pinned=True, copier=StrictCopier())
    with pytest.raises(ResourceError, match="leave out --use_pinned_memory_for_block_swap"):
        ring.hold(blocks[0])


MB = 2**20


@pytest.mark.parametrize(
    ("sizes", "count"),
    [([166 * MB] * 15, 12), ([166 * MB] * 2, 2), ([256 * MB] * 3, 2), ([3000 * MB] * 3, 1), ([5], 1)],
)
def test_page_locked_pieces_are_nearly_full(sizes, count):
    assert swapped_weights._fullest(sizes) == count


@given(st.integers(1, 60), st.data())
def test_swapped_blocks_are_spread_evenly(total, data):
    count = data.draw(st.integers(0, total))
    chosen = spread(total, count)
    assert len(chosen) == count == len(set(chosen))
    gaps = {b - a for a, b in itertools.pairwise(chosen)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_loading_puts_the_weights_of_swapped_blocks_on_the_cpu():
    model = nn.Module()
    model.layers = nn.ModuleList(make_blocks(12))
    model.other = nn.Linear(1, 1)
    chosen = chosen_blocks(list(model.layers), SwapOptions(blocks_to_swap=4))
    rule = device_of_weights(model, chosen, torch.device("meta"))
    kept = {name.split(".")[1] for name in model.state_dict() if rule(name) == CPU}
    assert kept == {"2", "5", "8", "11"}
    assert rule("other.weight") == rule("layers.1.gain") == torch.device("meta")
    with pytest.raises(ConfigError, match="--blocks_to_swap is 13, but the model has 12 blocks"):
        chosen_blocks(list(model.layers), SwapOptions(blocks_to_swap=13))


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_swapping_changes_no_bit_on_a_gpu(mode, pinned):
    gpu = torch.device("cuda")
    same = make_blocks(6, gpu)
    train_some(same)
    wanted = train(same, NoRing(), MODES[mode], previews=True, steps=5)
    blocks = make_blocks(6)
    ring = BlockSwap(blocks, gpu, pinned=pinned)
    train_some(blocks)
    for block in blocks[::2]:
        block.lora.data = block.lora.data.to(gpu)
    assert alike(train(blocks, ring, MODES[mode], previews=True, steps=5), wanted)


@pytest.mark.gpu
def test_the_gpu_holds_the_ring_only():
    gpu = warm_gpu()
    blocks = [nn.Linear(4096, 4096).requires_grad_(False) for _ in range(8)]
    size = 4 * (4096 * 4096 + 4096)
    ring = BlockSwap(blocks, gpu)
    x = torch.randn(64, 4096, device=gpu, requires_grad=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = x
    for block in blocks:
        y = run_plain(ring, block, y)
    y.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 3.5 * size  # two of them, activations, workspaces


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_a_model_that_leaves_the_gpu_leaves_nothing_there(pinned):
    gpu = warm_gpu()
    same = make_blocks(6, gpu)
    before = torch.cuda.memory_allocated()
    model = nn.ModuleList(make_blocks(6))
    for block in model[::2]:
        block.to(gpu)
    ring = BlockSwap(model[1::2], gpu, pinned=pinned)
    for _ in range(3):
        y = z = torch.ones(2, WIDTH, device=gpu)
        for block, other in zip(model, same, strict=True):
            ring.hold(block)
            y, z = block(y), other(z)
        assert torch.equal(y, z)
        del y, z
        ring.move_others(model, "cpu")
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        ring.move_others(model, gpu)
