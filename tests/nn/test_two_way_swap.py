"""Blocks whose weights come and go, and whose gradients go home, are trained as blocks that stay are."""

from __future__ import annotations

import copy
import itertools
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from library.models.nextdit import NextDiT
from library.nn.running.compiling import part_compiler
from library.nn.running.runner import MODES as KEPT
from library.nn.swap import swapped_weights
from library.nn.swap.block_swap import BlockSwap
from library.nn.swap.copy_streams import PlainCopier
from library.nn.swap.gradient_return import GradientReturn
from library.nn.swap.swapped_weights import SwappedWeights
from library.options.compute import ComputeOptions
from library.training.look.meter import Meter
from tests.models.lumina2_pairs import make_inputs, make_params
from tests.nn.test_block_swap import CPU, WIDTH, NoRing, run_checkpointed, run_plain
from tests.strict_copier import StrictCopier
from tests.warm_gpu import warm_gpu

RUNS = {"plain": run_plain, "checkpointed": run_checkpointed}


class Block(nn.Module):
    """Weights in fp32 and bf16, one of them used twice; a frozen gain and a buffer."""

    def __init__(self, hidden):
        super().__init__()
        self.wide = nn.Linear(WIDTH, hidden)
        self.narrow = nn.Linear(hidden, WIDTH, dtype=torch.bfloat16)
        self.twice = nn.Parameter(torch.randn(WIDTH))
        self.gain = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("shift", torch.randn(WIDTH))
        self.requires_grad_(False)

    def forward(self, x):
        hidden = torch.tanh(self.wide(x * self.twice + self.shift))
        return x * 0.5 + self.narrow(hidden.to(torch.bfloat16)).float() * self.twice * self.gain


def make_blocks(count, device=CPU):
    torch.manual_seed(0)
    return [Block(24 if n == 0 else 16).to(device) for n in range(count)]


def unfreeze(blocks):
    """Train everything but each block's gain, and nothing of the third block."""
    for number, block in enumerate(blocks):
        block.requires_grad_(number != 2)
        block.gain.requires_grad_(False)
    return [p for block in blocks for p in block.parameters() if p.requires_grad]


class NoReturn:
    """What takes the place of a `GradientReturn` without swapping."""

    def __init__(self, parameters, ring=None):
        self._parameters = parameters

    def collect(self):
        pass

    def clear(self):
        for parameter in self._parameters:
            parameter.grad = None


def forward(ring, blocks, run, x):
    for block in blocks:
        x = run(ring, block, x)
    return x


def batch(step, micro, device=CPU):
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(100 * step + micro)).to(device)


def look(ring, blocks, x):
    with torch.no_grad():
        for block in blocks:
            ring.hold(block)
            x = block(x)
    return x


def train(blocks, parameters, ring, returned, run, *, steps=3, micros=1, averaging=False, device=CPU):
    """Losses, gradients and weights of some steps, and what is drawn in between."""
    optimizer = torch.optim.AdamW(parameters, lr=0.05, foreach=False)
    found = []
    for step in range(steps):
        for micro in range(micros):
            loss = forward(ring, blocks, run, batch(step, micro, device)).square().mean()
            loss.backward()
            found.append(loss.detach())
        returned.collect()
        gradients = [p.grad for p in parameters]
        found += [torch.zeros(1) if g is None else g.clone() for g in gradients]
        torch._foreach_mul_([g for g in gradients if g is not None], 0.7)  # clipping
        optimizer.step()
        returned.clear()
        if averaging:
            found += average(blocks, parameters, ring, batch(step, 99, device))
    if isinstance(ring, BlockSwap):
        ring.bring_home()
    return [*found, *(p.detach() for p in parameters)]


@torch.no_grad()
def average(blocks, parameters, ring, x):
    """Drawings with the weights, with others put in their place, and with the weights again."""
    home = ring.bring_home if isinstance(ring, BlockSwap) else lambda: None
    pictures = [look(ring, blocks, x)]
    home()
    originals = [p.clone() for p in parameters]
    for parameter in parameters:
        parameter.mul_(0.9)
    pictures.append(look(ring, blocks, x))
    home()
    for parameter, original in zip(parameters, originals, strict=True):
        parameter.copy_(original)
    return [*pictures, look(ring, blocks, x)]


def assert_alike(found, wanted):
    assert len(found) == len(wanted)
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(one.cpu(), other.cpu()), f"number {number} of {len(found)}"


CHOSEN = {"all": lambda blocks: blocks, "some": lambda blocks: blocks[::2], "one": lambda blocks: blocks[3:4]}


def swapping(count=6, *, chosen="all", ring_size=2, copier=None, **options):
    blocks = make_blocks(count)
    copier = copier or StrictCopier()
    ring = BlockSwap(CHOSEN[chosen](blocks), CPU, ring_size=ring_size, copier=copier)
    parameters = unfreeze(blocks)
    return blocks, parameters, ring, copier


class Rest:
    """The gradients of a ring and those of weights that are not swapped."""

    def __init__(self, ring, parameters):
        self._returned, self._all = GradientReturn(ring), NoReturn(parameters)
        self.collect = self._returned.collect

    def clear(self):
        self._all.clear()
        self._returned.clear()


@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize(("ring_size", "micros"), [(1, 3), (2, 1), (2, 2), (9, 1)])
@pytest.mark.parametrize("mode", RUNS)
def test_swapping_changes_no_bit(mode, ring_size, chosen, micros):
    options = {"micros": micros, "averaging": ring_size % 2 == 0}
    same = make_blocks(6)
    parameters = unfreeze(same)
    wanted = train(same, parameters, NoRing(), NoReturn(parameters), RUNS[mode], **options)
    blocks, parameters, ring, copier = swapping(chosen=chosen, ring_size=ring_size)
    returned = Rest(ring, parameters)
    assert_alike(train(blocks, parameters, ring, returned, RUNS[mode], **options), wanted)
    assert copier.returning and all(each.landed for each in copier.returning)
    assert len(copier.rooms) == min(ring_size, len(CHOSEN[chosen](blocks)))


def test_the_plain_copier_too():
    same = make_blocks(6)
    parameters = unfreeze(same)
    wanted = train(same, parameters, NoRing(), NoReturn(parameters), run_plain, micros=2)
    blocks, parameters, ring, _ = swapping(copier=PlainCopier(CPU))
    assert_alike(train(blocks, parameters, ring, Rest(ring, parameters), run_plain, micros=2), wanted)


def forget_to_drop_rooms(ring):
    def bring_home():
        for weights in ring._weights:
            weights.point_to_masters()
        ring._held = None

    ring.bring_home = bring_home


def await_on_the_device_alone(ring):
    ring.copier.finish = ring.copier.await_copies


def let_go_at_once(ring):
    asked = ring.copier.copy_back
    ring.copier.copy_back = lambda pairs, after: asked([(t, s.clone()) for t, s in pairs], after)


@pytest.mark.parametrize("mistake", [forget_to_drop_rooms, await_on_the_device_alone, let_go_at_once])
def test_the_double_shows(mistake):
    same = make_blocks(3)
    parameters = unfreeze(same)
    wanted = train(same, parameters, NoRing(), NoReturn(parameters), run_plain)
    blocks, parameters, ring, _ = swapping(3, ring_size=3)  # there is room for all: nothing must be copied
    mistake(ring)
    with pytest.raises(AssertionError):
        assert_alike(train(blocks, parameters, ring, Rest(ring, parameters), run_plain), wanted)


def test_the_double_shows_masters_that_change_while_they_are_copied():
    blocks, parameters, ring, _ = swapping(3)
    ring.hold(blocks[0])  # and the next is on its way
    blocks[1].wide.weight.data += 1  # which torch does not count
    with pytest.raises(AssertionError, match="while it was being copied"):
        ring.hold(blocks[1])


@pytest.mark.parametrize("goes_home", [False, True])
def test_weights_that_change_after_they_were_fetched_ahead(goes_home):
    blocks, parameters, ring, _ = swapping(3)
    returned = Rest(ring, parameters)
    train(blocks, parameters, ring, returned, run_plain, steps=2)  # then it is known what comes first
    returned.clear()
    if goes_home:
        ring.bring_home()
    with torch.no_grad():
        blocks[0].wide.weight += 1
    if goes_home:
        wanted = blocks[0].wide.weight.clone()
        ring.hold(blocks[0])
        assert torch.equal(blocks[0].wide.weight, wanted)
    else:
        with pytest.raises(AssertionError, match="changed after it was copied"):
            ring.hold(blocks[0])


def test_what_was_fetched_ahead_can_be_read():
    blocks, parameters, ring, _ = swapping(3)
    returned = Rest(ring, parameters)
    before = [p.detach() for p in parameters]
    train(blocks, parameters, ring, returned, run_plain, steps=2)
    returned.clear()
    assert [room.block for room in ring._rooms] == [0, 1]
    assert [p.data_ptr() for p in parameters] == [p.data_ptr() for p in before]
    ring.release()
    assert not ring._rooms
    ring.fetch_ahead()  # before the ring is made again it does nothing
    assert not ring._rooms


@pytest.mark.parametrize("ring_size", [1, 2, 3])
def test_what_was_copied_ahead_for_the_next_step_is_not_used(ring_size):
    """Also where a pass ends at another block than the one that the next begins with."""
    blocks, parameters, ring, copier = swapping(3, ring_size=ring_size)
    for turn in range(3):
        look(ring, blocks, batch(0, turn))  # the last time, the first block is copied ahead
        ring.bring_home()
        assert copier.done == len(copier.asked)
        with torch.no_grad():
            for parameter in parameters:
                parameter += turn + 1.0
        wanted = [parameter.clone() for parameter in blocks[0].parameters()]
        ring.hold(blocks[0])
        assert_alike(list(blocks[0].parameters()), wanted)


@pytest.mark.parametrize("ring_size", [2, 3])
def test_no_step_waits_for_a_copy_but_the_first(ring_size):
    blocks, parameters, ring, copier = swapping(7, ring_size=ring_size)
    returned = Rest(ring, parameters)
    train(blocks, parameters, ring, returned, run_plain, steps=3)
    returned.clear()  # `train` looked at the weights
    late, asked = copier.late, len(copier.asked)
    train(blocks, parameters, ring, returned, run_plain, steps=4)
    assert copier.late == late
    # Forward each block once; back those that have no room at the turn. More would be copied in vain.
    assert len(copier.asked) - asked <= 4 * (7 + 7 - ring_size)


def test_home_is_free_when_nothing_was_held():
    blocks, parameters, ring, copier = swapping(3)
    ring.bring_home()
    look(ring, blocks, batch(0, 0))
    ring.bring_home()
    asked = len(copier.asked)
    for _ in range(2):
        ring.bring_home()
    assert len(copier.asked) == asked


def test_a_weight_that_was_given_other_memory_is_found_out():
    blocks, parameters, ring, _ = swapping(3)
    look(ring, blocks, batch(0, 0))
    ring.bring_home()
    blocks[1].wide.weight.data = torch.zeros_like(blocks[1].wide.weight)
    with pytest.raises(AssertionError, match="other memory"):
        look(ring, blocks, batch(0, 0))


def test_a_step_that_is_broken_off_leaves_nothing():
    runs = []
    for breaks in (False, True):
        blocks, parameters, ring, _ = swapping()
        returned = Rest(ring, parameters)
        if breaks:
            for micro in range(2):
                forward(ring, blocks, run_plain, batch(7, micro)).square().mean().backward()
            returned.clear()
            assert all(p.grad is None for p in parameters)
        runs.append(train(blocks, parameters, ring, returned, run_plain, micros=2))
    assert_alike(*runs)


def test_a_process_without_a_picture_has_no_gradients():
    blocks, parameters, ring, _ = swapping()
    returned = Rest(ring, parameters)
    forward(ring, blocks, run_plain, batch(0, 0)).mean().backward()
    returned.collect()
    assert {p.grad is None for p in parameters} == {False}
    returned.clear()
    returned.collect()
    assert {p.grad is None for p in parameters} == {True}


def test_frozen_weights_send_nothing():
    blocks = make_blocks(4)
    copier = StrictCopier()
    ring = BlockSwap(blocks, CPU, copier=copier)
    returned = GradientReturn(ring)
    x = batch(0, 0).requires_grad_()
    forward(ring, blocks, run_plain, x).mean().backward()
    returned.collect()
    assert not returned.parameters and not copier.returning and x.grad is not None


def test_watching_ends():
    blocks, parameters, ring, copier = swapping(3)
    returned = GradientReturn(ring)
    returned.close()
    forward(ring, blocks, run_plain, batch(0, 0)).mean().backward()
    assert not copier.returning and all(p.grad is not None for p in parameters)


# Weights that are stepped in backward


class Steps:
    """An optimizer a weight, which steps where the weight lies then."""

    def __init__(self, parameters):
        self._optimizers = {p: torch.optim.AdamW([p], lr=0.05, foreach=False) for p in parameters}
        self.gradients = []

    def __call__(self, parameter, gradient):
        self.gradients.append((id(parameter), gradient.clone()))
        parameter.grad = gradient
        self._optimizers[parameter].step()
        parameter.grad = None

    def at_once(self, parameter):
        self(parameter, parameter.grad)


def train_fused(blocks, parameters, run, ring=None, device=CPU, steps=3, beside=None):
    stepping = Steps(parameters)
    returned = GradientReturn(ring, arrived=stepping, beside=beside) if ring else None
    swapped = set(returned.parameters) if returned else set()
    for parameter in parameters:
        if parameter not in swapped:
            parameter.register_post_accumulate_grad_hook(stepping.at_once)
    found = []
    for step in range(steps):
        loss = forward(ring or NoRing(), blocks, run, batch(step, 0, device)).square().mean()
        loss.backward()
        found.append(loss.detach())
        if returned:
            returned.collect()
        assert all(p.grad is None for p in parameters)
        if returned:
            returned.clear()
        found += [p.detach().clone() for p in parameters]
        found.append(look(ring or NoRing(), blocks, batch(step, 1, device)))
        if ring:
            ring.bring_home()
    numbers = {id(p): number for number, p in enumerate(parameters)}
    order = sorted(range(len(stepping.gradients)), key=lambda n: numbers[stepping.gradients[n][0]])
    return [*found, *(stepping.gradients[n][1] for n in order)]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("ring_size", [1, 2, 9])
@pytest.mark.parametrize("mode", RUNS)
def test_weights_that_are_stepped_in_backward(mode, ring_size, chosen, beside):
    same = make_blocks(6)
    wanted = train_fused(same, unfreeze(same), RUNS[mode])
    blocks, parameters, ring, copier = swapping(chosen=chosen, ring_size=ring_size)
    assert_alike(train_fused(blocks, parameters, RUNS[mode], ring, beside=beside), wanted)
    assert all(each.landed for each in copier.returning)


class Slowly(Steps):
    """Steps that have hardly begun when backward goes on."""

    def __call__(self, parameter, gradient):
        time.sleep(0.002)
        super().__call__(parameter, gradient)


@pytest.mark.parametrize("mode", RUNS)
def test_steps_that_are_slower_than_backward(mode, monkeypatch):
    same = make_blocks(6)
    wanted = train_fused(same, unfreeze(same), RUNS[mode])
    flip_types(monkeypatch)
    monkeypatch.setitem(globals(), "Steps", Slowly)
    blocks, parameters, ring, _ = swapping(ring_size=9)
    assert_alike(train_fused(blocks, parameters, RUNS[mode], ring, beside=True), wanted)


def test_backward_goes_on_while_a_weight_is_stepped():
    blocks, parameters, ring, _ = swapping(3)
    gone_on, stepped, threads = threading.Event(), [], set()

    def step(parameter, gradient):
        assert gone_on.wait(timeout=60)
        stepped.append(parameter)
        threads.add(threading.get_ident())

    blocks[0].narrow.requires_grad_(False)
    blocks[0].twice.requires_grad_(False)
    blocks[1].requires_grad_(False)
    returned = GradientReturn(ring, arrived=step, beside=True)
    assert len(returned.parameters) == 2
    forward(ring, blocks, run_plain, batch(0, 0)).mean().backward()
    assert not stepped
    gone_on.set()
    returned.collect()
    assert len(stepped) == 2 and threading.get_ident() not in threads
    returned.close()


@pytest.mark.parametrize("number", [0, 5, -1])
def test_an_error_of_a_step_comes_out_as_itself(number):
    blocks, parameters, ring, _ = swapping(4)
    called = []

    def step(parameter, gradient):
        called.append(parameter)
        if len(called) == number % len(parameters) + 1:
            raise LookupError("no memory, say")

    returned = GradientReturn(ring, arrived=step, beside=True)
    with pytest.raises(LookupError, match="no memory, say"):
        forward(ring, blocks, run_plain, batch(0, 0)).mean().backward()
        returned.collect()
    returned.clear()
    assert all(p.grad is None for p in parameters)
    called += parameters  # now all goes well
    forward(ring, blocks, run_plain, batch(0, 0)).mean().backward()
    returned.collect()


@pytest.mark.parametrize("beside", [False, True])
def test_a_gradient_that_comes_while_its_block_is_copied(beside):
    blocks, parameters, ring, _ = swapping(3)
    returned = GradientReturn(ring, arrived=Steps(parameters), beside=beside)
    weight = blocks[1].wide.weight
    before = weight.detach().clone()
    ring.hold(blocks[0])  # and the next is on its way
    weight.sum().backward()
    returned.collect()
    assert not torch.equal(weight, before)


def test_a_step_that_is_broken_off_leaves_whole_weights():
    """Each is as it was or as it would have become, once the ring has its weights back."""
    results = []
    for breaks in (False, True):
        blocks, parameters, ring, _ = swapping(6)
        start = [p.detach().clone() for p in parameters]
        returned = GradientReturn(ring, arrived=Slowly(parameters), beside=True)

        def interrupt(gradient):
            raise KeyboardInterrupt

        loss = forward(ring, blocks, run_plain, batch(0, 0)).square().mean()
        if breaks:
            blocks[1].wide.weight.register_hook(interrupt)
        with pytest.raises(KeyboardInterrupt) if breaks else nullcontext():
            loss.backward()
        returned.clear()
        results.append([p.detach().clone() for p in parameters])
        returned.close()  # which would wait for a step that goes on
        assert_alike(parameters, results[-1])
    moved = [not torch.equal(a, b) for a, b in zip(results[1], start, strict=True)]
    assert any(moved) and not all(moved)
    wanted = [done if m else was for m, done, was in zip(moved, results[0], start, strict=True)]
    assert_alike(results[1], wanted)


def test_a_block_that_is_needed_again_after_its_weights_were_stepped():
    blocks, parameters, ring, _ = swapping(4, ring_size=2)
    returned = GradientReturn(ring, arrived=Steps(parameters))
    forward(ring, blocks, run_plain, batch(0, 0)).mean().backward()
    with pytest.raises(AssertionError, match="needed again"):
        forward(ring, blocks, run_plain, batch(0, 0))
    returned.clear()
    forward(ring, blocks, run_plain, batch(0, 0))


# Memory


def gradient_bytes(block):
    return sum(p.nbytes for p in block.parameters() if p.requires_grad)


@pytest.mark.parametrize(("fused", "beside"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("mode", RUNS)
def test_few_gradients_are_on_the_device(mode, fused, beside):
    blocks, parameters, ring, copier = swapping(12)
    returned = GradientReturn(ring, arrived=Steps(parameters) if fused else None, beside=beside)
    for step in range(2):
        forward(ring, blocks, RUNS[mode], batch(step, 0)).mean().backward()
        returned.collect()
        returned.clear()
    largest = max(p.nbytes for p in parameters)
    assert copier.most_alive <= (largest if fused else max(map(gradient_bytes, blocks)) + largest)
    assert sum(map(gradient_bytes, blocks)) > 5 * copier.most_alive


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_alive_on_the_device(fused):
    """Everything that is made in a step, but for what the gradients are kept in at home."""
    count, width, rows = 10, 64, 2
    blocks = [nn.Linear(width, width).requires_grad_(False) for _ in range(count)]
    size = sum(p.nbytes for p in blocks[0].parameters())
    ring = BlockSwap(blocks, CPU, copier=PlainCopier(CPU))
    for block in blocks:
        block.requires_grad_(True)
    returned = GradientReturn(ring, arrived=(lambda parameter, gradient: None) if fused else None)
    meter = Meter(kinds=("cpu",))
    for _ in range(2):
        with meter:
            forward(ring, blocks, run_checkpointed, torch.ones(rows, width)).sum().backward()
            returned.collect()
            returned.clear()
    activations = (count + 6) * rows * width * 4
    assert 2 * size < meter.peak < 2 * size + 3 * size + activations < count * size


def flip_types(monkeypatch):
    """Let autograd see what it sees where weights change their device: its nodes for them are made anew."""

    def point_to(self, places):
        for tensor, place in zip(self._tensors, places, strict=True):
            if tensor.data_ptr() != place.data_ptr():
                tensor.data = torch.empty(0, dtype=torch.float64)
            tensor.data = place

    monkeypatch.setattr(SwappedWeights, "_point_to", point_to)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", RUNS)
def test_weights_that_change_their_device(mode, fused, monkeypatch):
    same = make_blocks(6)
    parameters = unfreeze(same)
    if fused:
        wanted = train_fused(same, parameters, RUNS[mode])
    else:
        wanted = train(same, parameters, NoRing(), NoReturn(parameters), RUNS[mode], micros=2)
    flip_types(monkeypatch)
    blocks, parameters, ring, _ = swapping()
    if fused:
        found = train_fused(blocks, parameters, RUNS[mode], ring)
    else:
        found = train(blocks, parameters, ring, Rest(ring, parameters), RUNS[mode], micros=2)
    assert_alike(found, wanted)


@pytest.mark.parametrize("micros", [1, 2])
def test_blocks_that_run_twice_in_a_forward_pass(micros, monkeypatch):
    """Such a weight has several gradients in one backward, if it left the device in between."""

    def wander(monkeypatch=None):
        blocks, parameters, ring, _ = swapping(4, ring_size=1)
        if monkeypatch is None:
            ring, returned = NoRing(), NoReturn(parameters)
        else:
            flip_types(monkeypatch)
            returned = Rest(ring, parameters)
        for micro in range(micros):
            x = batch(0, micro)
            forward(ring, [*blocks, *blocks], run_plain, x).square().mean().backward()
        returned.collect()
        return [p.grad for p in parameters if p.grad is not None]

    for one, other in zip(wander(), wander(monkeypatch), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-5)  # they are added in another order


def test_blocks_that_run_twice_cannot_be_stepped_in_backward(monkeypatch):
    flip_types(monkeypatch)
    blocks, parameters, ring, _ = swapping(4, ring_size=1)
    GradientReturn(ring, arrived=Steps(parameters))
    loss = forward(ring, [*blocks, *blocks], run_plain, batch(0, 0)).mean()
    with pytest.raises(AssertionError, match="needed again"):
        loss.backward()


def test_gradients_in_page_locked_memory(monkeypatch):
    """As with page-locked memory, of which this test takes none."""
    pieces = []

    def memory(size):
        pieces.append(torch.empty(size, dtype=torch.uint8))
        return pieces[-1]

    monkeypatch.setattr(swapped_weights, "_locked", memory)
    same = make_blocks(6)
    parameters = unfreeze(same)
    wanted = train(same, parameters, NoRing(), NoReturn(parameters), run_plain, micros=2)
    blocks = make_blocks(6)
    ring = BlockSwap(blocks, CPU, pinned=True, copier=StrictCopier())
    parameters = unfreeze(blocks)
    returned = Rest(ring, parameters)
    own = list(pieces)
    assert_alike(train(blocks, parameters, ring, returned, run_plain, micros=2), wanted)
    targets = {each.target.data_ptr() for each in returned._returned._leaving._copier.returning}
    inside = [any(p.data_ptr() <= t < p.data_ptr() + len(p) for p in pieces) for t in targets]
    assert own and all(inside)


# A whole model


def make_model(**changes):
    torch.manual_seed(0)
    model = NextDiT(make_params(**changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=weight.shape[1] ** -0.5) if weight.dim() == 2 else weight.normal_(1.0, 0.1)
    return model.requires_grad_(False)


def train_model(model, inputs, steps=3, micros=2, routine=None):
    parameters = list(model.requires_grad_(True).parameters())
    ring = model.runner.ring
    returned = Rest(ring, parameters) if ring else NoReturn(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, foreach=False)
    found = []
    for _ in range(steps):
        for _ in range(micros):
            loss = inputs.ours(model).float().square().mean()
            loss.backward()
            found.append(loss.detach())
        returned.collect()
        found += [torch.zeros(1) if p.grad is None else p.grad.clone() for p in parameters]
        optimizer.step()
        returned.clear()
        with torch.no_grad():
            found.append(inputs.ours(model))
    if ring:
        ring.bring_home()
    return [*found, *(p.detach().clone() for p in parameters)]


@pytest.mark.parametrize(
    ("mode", "dtype"), [*zip(KEPT, itertools.repeat(torch.float32)), ("outputs", torch.bfloat16)]
)
def test_a_model_in_every_checkpoint_mode(mode, dtype):
    results = []
    for swaps in (False, True):
        model = make_model(n_layers=2).to(dtype)
        model.t_embedder.float()
        model.runner.keep(mode)
        if swaps:
            model.runner.ring = BlockSwap(model.runner.blocks, CPU, copier=StrictCopier())
        results.append(train_model(model, make_inputs(model.params, (9, 4), (8, 6))))
    assert_alike(results[1], results[0])


def test_compiled_blocks(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    model = make_model(n_layers=2, n_context_refiners=0, n_noise_refiners=0)
    start = copy.deepcopy(model.state_dict())
    model.runner.compile(part_compiler(ComputeOptions(torch_compile=True, dynamo_backend="aot_eager")))
    model.runner.keep("full", every=2)
    inputs = make_inputs(model.params, (9, 4), (8, 6))
    wanted = train_model(model, inputs, steps=2, micros=1)
    model.load_state_dict(start)
    model.requires_grad_(False)
    model.runner.ring = BlockSwap(model.runner.blocks, CPU, copier=StrictCopier())
    assert_alike(train_model(model, inputs, steps=2, micros=1), wanted)
    torch._dynamo.reset()


# A GPU


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", RUNS)
def test_on_a_gpu(mode, fused, pinned):
    """Gradients as without swapping; updates by the CPU, as far as it rounds as a GPU does."""
    gpu = torch.device("cuda")
    same, blocks = make_blocks(6, gpu), make_blocks(6)
    wanted, found = [], []
    for chosen, results in ((same, wanted), (blocks, found)):
        ring = BlockSwap(chosen, gpu, pinned=pinned) if chosen is blocks else None
        parameters = unfreeze(chosen)
        if fused:
            results += train_fused(chosen, parameters, RUNS[mode], ring, device=gpu)
        else:
            returned = GradientReturn(ring) if ring else NoReturn(parameters)
            options = {"micros": 2, "device": gpu}
            results += train(chosen, parameters, ring or NoRing(), returned, RUNS[mode], **options)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=2e-2, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_the_gpu_holds_the_ring_and_few_gradients(pinned):
    warm_gpu()
    blocks = [nn.Linear(2048, 2048).requires_grad_(False) for _ in range(10)]
    size = 4 * (2048 * 2048 + 2048)
    ring = BlockSwap(blocks, torch.device("cuda"), pinned=pinned)
    for block in blocks:
        block.requires_grad_(True)
    returned = GradientReturn(ring)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        x = torch.randn(64, 2048, device="cuda")
        forward(ring, blocks, run_plain, x).sum().backward()
        returned.collect()
        returned.clear()
    assert torch.cuda.max_memory_allocated() - before < 5 * size
