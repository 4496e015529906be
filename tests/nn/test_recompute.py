"""Values that are made again in backward: the same numbers, less kept, and hooks outside still at work."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from library.nn.running.recompute import Remaking, _RandomState, cheap, costly, slight

CALLS = []


def double(x):
    CALLS.append("double")
    return 2 * x


def drop(x):
    CALLS.append("drop")
    return torch.nn.functional.dropout(x, 0.5)


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()


def leaf(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def kept(function):
    """Numbers that autograd keeps of a function, counted by a hook outside; and the function's result."""
    sizes = {}

    def count(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        result = function()
    return sum(sizes.values()), result


def chain(x):
    """x is kept; y = 2x and its views are not; z is made of y, and is not kept either."""
    y = cheap(double, x)
    z = cheap(double, y)
    return (y[1:] * y[:-1]).sum() + z.square().sum() + (y.t() @ z).sum()


def test_outside_of_the_context_a_function_is_just_called():
    count, result = kept(lambda: chain(leaf(4, 4)))
    assert count == 32 and CALLS == ["double", "double"]
    result.backward()
    assert len(CALLS) == 2


def test_the_same_numbers_from_less():
    x, again = leaf(4, 4), leaf(4, 4)
    chain(x).backward()
    CALLS.clear()

    def inside():
        with Remaking():
            return chain(again)

    count, result = kept(inside)
    assert count == 16  # x alone
    result.backward()
    assert torch.equal(x.grad, again.grad)
    assert CALLS == ["double"] * 4  # each once forward, once for all that wait for it in backward


def test_a_second_backward_makes_them_once_more():
    x = leaf(4, 4)
    with Remaking():
        result = chain(x)
    (first,) = torch.autograd.grad(result, x, retain_graph=True)
    (second,) = torch.autograd.grad(result, x)
    assert torch.equal(first, second)


def test_random_numbers_of_costly_functions_come_again_and_disturb_nobody():
    grads, after = [], []
    for context in (None, Remaking(products="all")):
        x = leaf(50, 50)
        torch.manual_seed(3)
        if context is None:
            y = costly(drop, x)
            (y * y).sum().backward()
        else:
            with context:
                y = costly(drop, x)
                result = (y * y).sum()
            torch.manual_seed(7)
            result.backward()
            after = torch.rand(3)
        grads.append(x.grad)
    assert torch.equal(*grads)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(3))


def test_costly_functions_are_kept_unless_asked_for():
    x = leaf(4, 4)
    prepared = []
    with Remaking():
        costly(double, x).square().sum().backward()
    assert CALLS == ["double"]
    with Remaking(products="wide"):
        costly(double, x).square().sum().backward()
    assert CALLS == ["double"] * 2
    CALLS.pop()
    with Remaking(products="all", prepare=lambda: prepared.append(len(CALLS))):
        result = costly(double, x).square().sum()
    assert prepared == []
    result.backward()
    assert prepared == [2] and CALLS == ["double"] * 3


def test_wide_results_alone_can_be_made_again():
    with Remaking(products="wide"):
        result = costly(double, leaf(4, 4), wide=True).square().sum()
        result = result + costly(drop, leaf(4, 4)).square().sum()
    result.backward()
    assert CALLS == ["double", "drop", "double"]


@pytest.mark.parametrize("context", [Remaking, nullcontext])
def test_several_results_are_made_at_once_and_only_those_in_use_are_held(context):
    def halves(x):
        CALLS.append("halves")
        return x[:2] * 2.0, x[2:] * 3.0

    def inside():
        with context():
            first, second = cheap(halves, x)
            return (first * second.exp()).sum() + (second * second).sum()

    x = leaf(4, 4)
    count, result = kept(inside)
    (found,) = torch.autograd.grad(result, x)
    first, second = halves(x)
    expected = torch.autograd.grad((first * second.exp()).sum() + (second * second).sum(), x)
    assert torch.equal(found, expected[0])
    if context is Remaking:
        assert count == 16 + 8  # x, and the exponentials
        assert CALLS == ["halves"] * 3


def test_slight_functions_are_made_again_with_all_that_they_keep():
    def softmax(x):
        CALLS.append("softmax")
        return x.softmax(-1)  # keeps its result

    def whole(x):
        y = slight(softmax, x)
        return (y * y).sum()

    x, again = leaf(4, 4), leaf(4, 4)
    whole(x).backward()

    def inside(products):
        with Remaking(products=products):
            return whole(again)

    assert kept(lambda: inside("wide"))[0] == 16  # the result
    CALLS.clear()
    count, result = kept(lambda: inside("all"))
    assert count == 16  # the input
    result.backward()
    assert CALLS == ["softmax"] * 3
    assert torch.equal(x.grad, again.grad)


def test_an_error_inside_ends_the_context():
    with pytest.raises(RuntimeError, match="no such"), Remaking():
        cheap(double, leaf(2))
        raise RuntimeError("no such luck")
    count, _ = kept(lambda: chain(leaf(4, 4)))
    assert count == 32


def test_a_result_that_dies_leaves_its_address_to_others():
    """Memory that is freed inside the context and used again must not be mistaken for what was there."""
    x = leaf(64, 64)
    with Remaking():
        total = x.sum()
        for _ in range(20):
            cheap(double, x)
            y = x * 3
            total = total + (y * y).sum()
    (grad,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(grad, 1 + 20 * 18 * x.detach())


def test_generators_of_a_gpu_come_back_too(monkeypatch):
    now = torch.tensor([1], dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: now.clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: now.copy_(state))
    with FakeTensorMode():
        there = torch.empty(1, device="cuda:0")
    before = _RandomState((there, there, 3.0))
    assert before.is_still_so((there,))
    now.fill_(2)
    assert not before.is_still_so((there,))
    with before.again():
        assert now.item() == 1
        now.fill_(7)
    assert now.item() == 2
