"""What a computation takes: the memory of its tensors, and the time that a GPU of the middle would need.

A `Meter` sees every operation that torch carries out while it is entered, in backward too. It follows each
storage from when it is made until it is freed, on the meta device as on a real one. Not seen is what a kernel
takes for itself and gives back before it ends, unless the table at the end of this module knows of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


@dataclass(frozen=True)
class Speeds:
    """How fast a device is.

    products: multiplications and additions of matrices, a second. memory, link: bytes a second from and to
    its own memory, and from and to the computer's. launch: seconds that the smallest operation takes.
    host: bytes a second that the computer's own processor moves of the computer's memory. Two channels of
    DDR4-3200 have 51e9, of which an optimizer's many passes reach less than half.
    """

    products: float = 60e12
    memory: float = 500e9
    link: float = 20e9
    launch: float = 5e-6
    host: float = 20e9


class Meter(TorchDispatchMode):
    """Counts bytes that are alive, the most there were, and seconds by the roofline of `speeds`.

    An operation takes as long as its products, or moving its operands, whichever is longer.
    """

    def __init__(self, kinds: Collection[str] = ("meta",), speeds: Speeds | None = None) -> None:
        """`kinds`: of the devices whose memory is counted. Without `speeds` no time is."""
        super().__init__()
        self.live = self.peak = 0
        self.seconds = 0.0
        self._kinds = frozenset(kinds)
        self._speeds = speeds
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._ignored: list[torch.UntypedStorage] = []  # alive, so that no address comes twice
        self._ignored_places: set[int] = set()

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before, each storage once."""
        for tensor in tensors:
            self._follow(tensor.untyped_storage())

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave these out, and whatever shares their storage: they were there before."""
        self._ignored += [tensor.untyped_storage() for tensor in tensors]
        self._ignored_places = {storage._cdata for storage in self._ignored}

    def take_peak(self) -> int:
        """Return the most bytes that were alive since the last call, and begin anew with what is alive."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        result = self._copied_out(func, args)
        if result is None:
            result = func(*args, **kwargs)
        if func.is_view:
            return result
        given, made = list(_tensors(args, kwargs.values())), list(_tensors((result,)))
        new = [storage for tensor in made if (storage := self._unknown(tensor)) is not None]
        if new:
            there = {tensor.untyped_storage()._cdata for tensor in given}
            for storage in new:
                if storage._cdata not in there:
                    self._follow(storage)
        room = _ROOMS.get(func._schema.name)
        if room is not None and given[0].device.type in self._kinds:
            self.peak = max(self.peak, self.live + room(*args))
        if self._speeds is not None:
            self.seconds += self._seconds(self._speeds, func, args, kwargs, result, given, made)
        return result

    def _unknown(self, tensor: Tensor) -> torch.UntypedStorage | None:
        """The storage of a tensor that lies where it counts and is not followed yet."""
        if tensor.device.type not in self._kinds:
            return None
        storage = tensor.untyped_storage()
        if storage.device.type not in self._kinds:
            return None  # a fake tensor names a device where it takes nothing: its storage is a meta one
        return None if storage._cdata in self._alive else storage

    def _copied_out(self, func: torch._ops.OpOverload, args: tuple[object, ...]) -> object:
        """A copy from the meta device to the computer's memory, which torch refuses, has nothing to copy."""
        if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]
        return None

    def _follow(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._alive or place in self._ignored_places:
            return

        def gone(_: object) -> None:
            del self._alive[place]
            self.live -= size

        self._alive[place] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _seconds(
        self,
        speeds: Speeds,
        func: torch._ops.OpOverload,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        result: object,
        given: list[Tensor],
        made: list[Tensor],
    ) -> float:
        moved = sum(_nbytes(tensor) for tensor in (*given, *made))
        if not moved:  # nothing is launched: some versions of torch make empty tensors for a checkpoint
            return 0.0
        count = _FLOPS.get(func._schema.name)
        products = 0 if count is None else count(*args, **kwargs, out_val=result)
        crosses = len({tensor.device.type for tensor in (*given, *made)}) > 1
        rate = speeds.link if crosses else speeds.memory
        return max(products / speeds.products, moved / rate, speeds.launch)


def _tensors(*groups: Iterable[object]) -> Iterator[Tensor]:
    for group in groups:
        for value in group:
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, list | tuple):
                yield from _tensors(value)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ---- what is known of kernels ----


def _flash_flops(q_BHTD: Tensor, k_BKSD: Tensor, *_: object, **__: object) -> int:
    """Two products of every query with every key. Before 2.13 torch's formula refused fewer heads of keys."""
    return 4 * q_BHTD.numel() * k_BKSD.shape[2]


def _flash_backward_flops(grad_BHTD: Tensor, q_BHTD: Tensor, k_BKSD: Tensor, *_: object, **__: object) -> int:
    """Five products where the way forward has two."""
    return _flash_flops(q_BHTD, k_BKSD) * 5 // 2


def _varlen_flops(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *others: object, **_: object) -> int:
    """Two products of every token with the longest sample's; at most that many are made."""
    longest = next(value for value in others if isinstance(value, int))
    tokens, heads, width = q_THD.shape
    return 4 * tokens * heads * width * longest


def _varlen_backward_flops(grad_THD: Tensor, *others: object, **_: object) -> int:
    """Five products where the way forward has two."""
    return _varlen_flops(grad_THD, *others[1:]) * 5 // 2


def _counts() -> dict[str, Callable[..., int]]:
    """Formulas for multiplications and additions, by operation: torch's own, and what they do not list."""
    named = {
        packet._qualified_op_name: count
        for packet, count in flop_registry.items()
        if isinstance(packet, torch._ops.OpOverloadPacket)
    }
    return named | {
        "aten::addmm_": named["aten::addmm"],
        "aten::_int_mm": named["aten::mm"],
        "aten::_scaled_dot_product_flash_attention": _flash_flops,
        "aten::_scaled_dot_product_flash_attention_backward": _flash_backward_flops,
        "torch_attn::_varlen_attn": _varlen_flops,
        "torch_attn::_varlen_attn_backward": _varlen_backward_flops,
    }


_FLOPS = _counts()


def _backward_room(tokens: int, samples: int, q_heads: int, k: Tensor, k_heads: int) -> int:
    """FlashAttention adds up the queries' gradient in fp32, and makes keys' and values' for every query head
    where they have fewer. Samples are padded to 128 tokens, head sizes to 32."""
    width = k.shape[-1]
    rows, columns = tokens + 128 * samples, -(-width // 32) * 32
    grouped = 2 * q_heads * k.numel() // k_heads * k.element_size() if k_heads != q_heads else 0
    return 4 * q_heads * rows * (columns + 1) + grouped


def _flash_backward_room(grad_BHTD: Tensor, q: Tensor, k_BKTD: Tensor, *_: object) -> int:
    samples, heads, tokens, _ = grad_BHTD.shape
    return _backward_room(samples * tokens, samples, heads, k_BKTD, k_BKTD.shape[1])


def _varlen_backward_room(grad_THD: Tensor, q: Tensor, k_TKD: Tensor, *others: object) -> int:
    tokens, heads, _ = grad_THD.shape
    ends = others[3]
    assert isinstance(ends, Tensor)
    return _backward_room(tokens, len(ends) - 1, heads, k_TKD, k_TKD.shape[1])


def _index_room(x: Tensor, indices: Sequence[Tensor | None]) -> int:
    """Numbers of 32 bits are made into 64 before anything is looked up by them."""
    return sum(8 * i.numel() for i in indices if i is not None and i.dtype == torch.int32)


_ROOMS: dict[str, Callable[..., int]] = {
    "aten::index": _index_room,
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward_room,
    "torch_attn::_varlen_attn_backward": _varlen_backward_room,
}
