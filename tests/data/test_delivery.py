"""The next batch is on its way while this one is in use, and none is used before it has arrived."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

import pytest
import torch
from torch import Tensor

from library.core.errors import DataError
from library.data.batch import Batch, Condition
from library.data.delivery import delivered
from library.data.items import Draw


class Carrier:
    """Copies as late as it may: what is read too early holds NaN."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def send(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        self.log.append("send")
        return [torch.full_like(tensor, float("nan")) for tensor in tensors], list(tensors)

    def receive(self, copies: Sequence[Tensor], arrival: list[Tensor]) -> None:
        self.log.append("receive")
        for copy, source in zip(copies, arrival, strict=True):
            copy.copy_(source)


def batch_of(number: int) -> Batch:
    """Return a batch with a tensor in each of its fields."""
    value = torch.full((2,), float(number))
    return Batch(
        draws=(Draw(number, 0, 0, number, 0, 0),),
        names=("a",),
        captions=("b",),
        weights_B=value,
        latents=(value + 0.1, value + 0.2),
        conditions=(Condition(value + 0.3, value + 0.4), Condition(value + 0.5)),
        masks=(value + 0.6,),
        sigma_B=value + 0.7,
        noise=(value + 0.8,),
        perturbation=(value + 0.9,),
    )


def tensors_of(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    batch.map(lambda tensor: found.append(tensor) or tensor)
    return found


def source(count: int, log: list[str], fails_at: int | None = None) -> Iterator[tuple[int, int, Batch]]:
    try:
        for number in range(count):
            if number == fails_at:
                raise DataError("gone")
            log.append("load")
            yield number, 0, batch_of(number)
    finally:
        log.append("closed")


def test_every_tensor_arrives_and_all_else_stays() -> None:
    for number, (step, micro, batch) in enumerate(delivered(source(3, []), Carrier())):
        wanted = batch_of(number)
        assert (step, micro, batch.draws, batch.names) == (number, 0, wanted.draws, wanted.names)
        assert len(tensors_of(batch)) == 10
        assert all(map(torch.equal, tensors_of(batch), tensors_of(wanted)))


def test_one_batch_is_sent_ahead_and_no_more() -> None:
    carrier = Carrier()
    for _ in delivered(source(3, carrier.log), carrier):
        carrier.log.append("use")
    first, middle = ["load", "send"], ["load", "send", "receive", "use"]
    assert carrier.log == [*first, *middle, *middle, "closed", "receive", "use"]


def test_a_batch_that_fails_fails_in_its_place() -> None:
    seen = []
    with pytest.raises(DataError, match="gone"):
        for step, *_ in delivered(source(5, [], fails_at=2), Carrier()):
            seen.append(step)
    assert seen == [0, 1]


def test_closing_closes_what_loads() -> None:
    carrier = Carrier()
    with closing(delivered(source(5, carrier.log), carrier)) as batches:
        next(batches)
    assert carrier.log[-1] == "closed"


@pytest.mark.parametrize("count", [0, 1])
def test_few_batches(count: int) -> None:
    assert len(list(delivered(source(count, []), Carrier()))) == count
