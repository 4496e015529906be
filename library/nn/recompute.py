"""Values that backward needs, made again there instead of kept.

Checkpointing a whole block computes all of it twice. Here a block keeps what was expensive, and of the rest
only how it was made:

    with Remaking():                  # around the forward pass of a block; `library.nn.runner` does that
        y = cheap(function, *inputs)  # if autograd wants to keep y, it keeps `function` and `inputs`

Outside of `Remaking`, `cheap(f, *inputs)` is `f(*inputs)`. A function must not change its inputs, and what it
returns must be a new tensor. Values come out the same bit for bit, because the same operations run again on
the same inputs; the graph itself is not built again, which is what makes this cheaper than a checkpoint.

Inputs are kept as autograd would have kept them: hooks for saved tensors that were set outside see them
still.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import get_device_states, set_device_states


def cheap(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """Return function(*inputs), for a function that costs little beside a product of matrices.

    It must be deterministic.
    """
    remaking = None if torch.compiler.is_compiling() else _current.get()
    result = function(*inputs)
    return result if remaking is None else remaking.note(result, function, inputs)


def costly(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """Return function(*inputs), for a product whose result is much larger than what it is made from.

    It may draw random numbers from torch's own generators: the same come again.
    """
    remaking = None if torch.compiler.is_compiling() else _current.get()
    if remaking is None or not remaking.products_too:
        return function(*inputs)
    again = _Replay(function, remaking.prepare, inputs)
    return remaking.note(function(*inputs), again, inputs)


class Remaking:
    """A context in which autograd keeps recipes in place of the results of `cheap` functions."""

    def __init__(self, *, products_too: bool = False, prepare: Callable[[], None] | None = None) -> None:
        """`products_too`: of `costly` ones as well. `prepare` is called before each of these runs again."""
        self.products_too = products_too
        self.prepare = prepare
        self._made: dict[int, _Made] = {}
        self._results: list[Tensor] = []  # alive while the block runs, so that no address comes twice
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
        self._results.clear()

    def note(self, result: Tensor, function: Callable[..., Tensor], inputs: tuple[object, ...]) -> Tensor:
        """Remember how `result` was made; return it."""
        self._results.append(result)
        self._made[result.untyped_storage()._cdata] = _Made(self, function, inputs)
        return result

    def pack(self, tensor: Tensor) -> object:
        """Return what is kept of a tensor: where it can be made again, a view of something to be made."""
        made = self._made.get(tensor.untyped_storage()._cdata)
        if made is None:
            return self._outer_pack(tensor)
        return _View(made.reserve(), tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(self, packed: object) -> Tensor:
        """Return the tensor."""
        if not isinstance(packed, _View):
            return self._outer_unpack(packed)
        return packed.made.take().as_strided(packed.size, packed.stride, packed.offset)


_current: ContextVar[Remaking | None] = ContextVar("remaking", default=None)


class _Made:
    """A result with its recipe. It is made once for all that wait for it, and forgotten after the last."""

    def __init__(
        self, remaking: Remaking, function: Callable[..., Tensor], inputs: tuple[object, ...]
    ) -> None:
        self._remaking, self._function = remaking, function
        self._inputs = inputs
        self._waiting = 0
        self._packed = False
        self._value: Tensor | None = None

    def reserve(self) -> _Made:
        """Count one more who will take it."""
        if not self._packed:  # not before anyone wants it: some results are never kept
            self._packed = True
            self._inputs = tuple(self._pack(x) for x in self._inputs)
        self._waiting += 1
        return self

    def take(self) -> Tensor:
        """Return the result, made again if it is not there."""
        value = self._value
        if value is None:
            with torch.no_grad():
                value = self._function(*(self._unpack(x) for x in self._inputs))
        self._waiting -= 1
        self._value = value if self._waiting > 0 else None
        return value

    def _pack(self, x: object) -> object:
        return _Input(self._remaking.pack(x.detach())) if isinstance(x, Tensor) else x

    def _unpack(self, x: object) -> object:
        return self._remaking.unpack(x.packed) if isinstance(x, _Input) else x


@dataclass(frozen=True)
class _Input:
    """A tensor among the inputs, as it is kept."""

    packed: object


@dataclass(frozen=True)
class _View:
    """Where in a result a kept tensor lies."""

    made: _Made
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Replay:
    """A function as it was called once: with the same random numbers."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        prepare: Callable[[], None] | None,
        inputs: tuple[object, ...],
    ) -> None:
        self._function, self._prepare = function, prepare
        self._cpu_state = torch.get_rng_state()
        self._devices, self._states = get_device_states(*inputs)

    def __call__(self, *inputs: object) -> Tensor:
        if self._prepare is not None:
            self._prepare()
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._cpu_state)
            set_device_states(self._devices, self._states)
            return self._function(*inputs)


def _unchanged(x: object) -> object:
    return x
