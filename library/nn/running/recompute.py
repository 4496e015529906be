"""Values that backward needs, made again there instead of kept.

Checkpointing a whole block computes all of it twice. Here a block keeps what was expensive, and of the rest
only how it was made:

    with Remaking():                  # around the forward pass of a block, see runner.py
        y = cheap(function, *inputs)  # if autograd wants to keep y, it keeps `function` and `inputs`

Outside of `Remaking`, `cheap(f, *inputs)` is `f(*inputs)`. A function must not change its inputs, and what it
returns must be a new tensor, or a tuple of new tensors. Values come out the same bit for bit, because the
same operations run again on the same inputs; the graph itself is not built again, which is what makes this
cheaper than a checkpoint.

Inputs are kept as autograd would have kept them: hooks for saved tensors that were set outside see them
still.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.autograd.graph import saved_tensors_hooks

Result = TypeVar("Result", Tensor, tuple[Tensor, ...])


def cheap(function: Callable[..., Result], *inputs: object) -> Result:
    """Return function(*inputs), for a function that costs little beside a product of matrices.

    It must be deterministic.
    """
    remaking = None if torch.compiler.is_compiling() else _current.get()
    result = function(*inputs)
    return result if remaking is None else remaking.note(result, function, inputs)


def costly(function: Callable[..., Result], *inputs: object, wide: bool = False) -> Result:
    """Return function(*inputs), for products that take one product of a square matrix for each width.

    That is as little as a product can take. One whose result is narrower than what it is made from (the last
    of a feed-forward) takes more to make again, and is not marked. The function may draw random numbers from
    torch's own generators: the same come again.

    Args:
        wide: its result is much larger than what it is made from, which may be kept at little cost.
    """
    remaking = None if torch.compiler.is_compiling() else _current.get()
    if remaking is None or remaking.products == "none" or (remaking.products == "wide" and not wide):
        return function(*inputs)
    before = _RandomState(inputs)
    result = function(*inputs)
    drawn_from = None if before.is_still_so(inputs) else before
    return remaking.note(result, _Replay(function, remaking.prepare, drawn_from), inputs)


def slight(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return function(*inputs), for an attention that takes less than a product of a square matrix.

    So it is made again wherever all products are, and with it what its own backward keeps. It must be
    deterministic.
    """
    remaking = None if torch.compiler.is_compiling() else _current.get()
    if remaking is None or remaking.products != "all":
        return function(*inputs)
    return remaking.note(run_again_in_backward(function, *inputs), function, inputs)


def run_again_in_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return function(*inputs), keeping only the inputs for backward and calling `function` again there.

    Like checkpointing, for a few deterministic operations: no random state is saved and no hooks are set.
    """
    return _RunAgain.apply(function, *inputs)


class _RunAgain(torch.autograd.Function):
    """See `run_again_in_backward`."""

    @staticmethod
    def forward(ctx: FunctionCtx, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            pairs = zip(ctx.saved_tensors, needed, strict=True)
            inputs = [x.detach().requires_grad_(need) for x, need in pairs]
            output = ctx.function(*inputs)
        wanted = [x for x in inputs if x.requires_grad]
        grads = iter(torch.autograd.grad(output, wanted, grad))
        return None, *(next(grads) if need else None for need in needed)


class Remaking:
    """A context in which autograd keeps recipes in place of the results of `cheap` functions."""

    def __init__(self, *, products: str = "none", prepare: Callable[[], None] | None = None) -> None:
        """`products`: of which `costly` ones as well, "none", "wide" or "all". `prepare` is called before
        each of these runs again."""
        self.products = products
        self.prepare = prepare
        self._made: dict[int, tuple[_Made, int]] = {}
        self._alive: list[weakref.ref[torch.UntypedStorage]] = []
        self._exits = ExitStack()
        self._outer_pack: Callable[[Tensor], object] = _unchanged
        self._outer_unpack: Callable[[object], Tensor] = _unchanged

    def __enter__(self) -> Remaking:
        # Hooks do not add up: only the innermost are called. So these pass on what is not theirs.
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if outer is not None:
            self._outer_pack, self._outer_unpack = outer
        self._exits.enter_context(saved_tensors_hooks(self.pack, self.unpack))
        token = _current.set(self)
        self._exits.callback(_current.reset, token)
        return self

    def __exit__(self, *exc: object) -> None:
        self._exits.close()
        self._made.clear()
        self._alive.clear()

    def note(self, result: Result, function: Callable[..., Result], inputs: tuple[object, ...]) -> Result:
        """Remember how `result` was made; return it."""
        made = _Made(self, function, inputs)
        for number, tensor in enumerate(_all(result)):
            self._note(tensor, made, number)
        return result

    def _note(self, tensor: Tensor, made: _Made, number: int) -> None:
        storage, notes = tensor.untyped_storage(), self._made
        place = storage._cdata
        notes[place] = (made, number)
        # Once it is gone, something else may get its address.
        self._alive.append(weakref.ref(storage, lambda _: notes.pop(place, None)))

    def pack(self, tensor: Tensor) -> object:
        """Return what is kept of a tensor: where it can be made again, a view of something to be made."""
        noted = self._made.get(tensor.untyped_storage()._cdata)
        if noted is None:
            return self._outer_pack(tensor)
        made, number = noted
        return _View(made.reserve(), number, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(self, packed: object) -> Tensor:
        """Return the tensor."""
        if not isinstance(packed, _View):
            return self._outer_unpack(packed)
        return packed.of(packed.made.take()[packed.number])


_current: ContextVar[Remaking | None] = ContextVar("remaking", default=None)


class _Made:
    """Results with their recipe: made once for all that wait for them, and forgotten after the last."""

    def __init__(
        self, remaking: Remaking, function: Callable[..., Result], inputs: tuple[object, ...]
    ) -> None:
        self._remaking, self._function = remaking, function
        self._inputs = inputs
        self._waiting = 0
        self._packed = False
        self._value: tuple[Tensor, ...] | None = None

    def reserve(self) -> _Made:
        """Count one more who will take it."""
        if not self._packed:  # not before anyone wants it: some results are never kept
            self._packed = True
            self._inputs = tuple(self._pack(x) for x in self._inputs)
        self._waiting += 1
        return self

    def take(self) -> tuple[Tensor, ...]:
        """Return the results, made again if they are not there."""
        value = self._value
        if value is None:
            with torch.no_grad():
                value = _all(self._function(*(self._unpack(x) for x in self._inputs)))
        self._waiting -= 1
        self._value = value if self._waiting > 0 else None
        return value

    def _pack(self, x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        return _Input(self._remaking.pack(x.detach() if x.requires_grad else x))

    def _unpack(self, x: object) -> object:
        return self._remaking.unpack(x.packed) if isinstance(x, _Input) else x


class _Input(NamedTuple):
    """A tensor among the inputs, as it is kept."""

    packed: object


class _View(NamedTuple):
    """Where in which of the results a kept tensor lies. A step makes thousands: a dataclass is slower."""

    made: _Made
    number: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, result: Tensor) -> Tensor:
        """Return the view, which most often is the result itself."""
        if result.size() == self.size and result.stride() == self.stride and not self.offset:
            return result
        return result.as_strided(self.size, self.stride, self.offset)


class _RandomState:
    """Where torch's generators are, of the CPU and of the accelerators that some tensors lie on."""

    def __init__(self, inputs: tuple[object, ...]) -> None:
        devices = dict.fromkeys(x.device for x in inputs if isinstance(x, Tensor))
        self._devices = [device for device in devices if device.type not in ("cpu", "meta")]
        self._states = [torch.get_rng_state()]
        self._states += [torch.get_device_module(device).get_rng_state(device) for device in self._devices]

    def is_still_so(self, inputs: tuple[object, ...]) -> bool:
        """Whether nothing has drawn from them since; it costs microseconds."""
        pairs = zip(self._states, _RandomState(inputs)._states, strict=True)
        return all(one.numpy().tobytes() == other.numpy().tobytes() for one, other in pairs)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Put the generators back there for a while."""
        cpu, *others = self._states
        kind = self._devices[0].type if self._devices else "cuda"  # of one kind, if there are any
        with torch.random.fork_rng([device.index for device in self._devices], device_type=kind):
            torch.set_rng_state(cpu)
            for device, state in zip(self._devices, others, strict=True):
                torch.get_device_module(device).set_rng_state(state, device)
            yield


@dataclass(frozen=True)
class _Replay:
    """A function as it was called once: with the same random numbers, if it drew any."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    prepare: Callable[[], None] | None
    drawn_from: _RandomState | None

    def __call__(self, *inputs: object) -> Tensor | tuple[Tensor, ...]:
        if self.prepare is not None:
            self.prepare()
        with nullcontext() if self.drawn_from is None else self.drawn_from.again():
            return self.function(*inputs)


def _all(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def _unchanged(x: object) -> object:
    return x
