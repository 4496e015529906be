"""Validation measures the same pictures in the same way, however many processes share the work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.core.errors import ConfigError, Stopped
from library.data.batch import Batch
from library.data.items import (
    BucketOptions,
    CaptionOptions,
    Dataset,
    Draw,
    Geometry,
    ImageOptions,
    Item,
    Subset,
)
from library.options.training import ValidationOptions
from library.training.events import Moment
from library.training.validation import SIGMAS, Validation, measured

SUBSET = Subset("dreambooth", Path("p"), CaptionOptions(), ImageOptions())
MOMENT = Moment(step=4, epoch=2, epoch_ended=True, run_ended=False)


def make_items(count: int, batch_size: int = 1, start: int = 0) -> list[Item]:
    dataset = Dataset((SUBSET,), BucketOptions((64, 64)), batch_size)
    place = Geometry((64, 64), (0, 0), (64, 64))
    return [
        Item(n, dataset, 0, SUBSET, Path(f"p/{n}.png"), (64, 64), place, "", 1, f"digest {n}", held_out=True)
        for n in range(start, start + count)
    ]


class World:
    """Processes as threads of one, with what they do together."""

    device = torch.device("cpu")

    def __init__(self, world: int) -> None:
        self.world = world
        self._barrier = threading.Barrier(world, timeout=20)
        self._parts: list[object] = [None] * world

    def together(self, rank: int, part: object) -> list[object]:
        self._parts[rank] = part
        self._barrier.wait()
        parts = list(self._parts)
        self._barrier.wait()
        return parts


class Process:
    def __init__(self, world: World, rank: int) -> None:
        self._world, self.rank, self.world, self.device = world, rank, world.world, world.device

    def any(self, wish: bool) -> bool:
        return any(self._world.together(self.rank, wish))

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._world.together(self.rank, tensor)).sum(dim=0)


class Model:
    """Inputs and objective in one: its loss hangs on the picture, the noise and sigma. Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.module = nn.Dropout(0.5)
        self.seen: list[bool] = []

    def latents(self, batch: Batch) -> list[Tensor]:
        return [torch.full((2, 3, 3), 0.37 * batch.draws[0].item)]

    def conditions(self, batch: Batch) -> list[object]:
        return []

    def losses_at(self, batch: Batch, noisy: object, conditions: object) -> Tensor:
        self.calls += 1
        self.seen.append(self.module.training or torch.is_grad_enabled())
        return noisy.x[0].square().mean() + noisy.sigma_B


class Stop:
    """Asks to stop from its `at`-th question on."""

    def __init__(self, at: int | None = None) -> None:
        self._left = at

    def reason(self) -> str | None:
        if self._left is None:
            return None
        self._left -= 1
        return "SIGTERM" if self._left < 0 else None


def batches(items: Sequence[Item]) -> Iterator[Batch]:
    for item in items:
        draw = Draw(item.index, 0, 0, 0, 0, 0)
        yield Batch((draw,), (str(item.path),), ("",), torch.ones(1))


def validate(
    items: Sequence[Item],
    world: int = 1,
    stop: Callable[[int], Stop] = lambda rank: Stop(),
    **options: object,
) -> tuple[list[dict[str, float]], list[Model], list[BaseException | None]]:
    """Run a validation on so many processes; return what each reports, its model, and what it raised."""
    together = World(world)
    reports: list[dict[str, float]] = [{} for _ in range(world)]
    models = [Model() for _ in range(world)]

    def one(rank: int) -> BaseException | None:
        model = models[rank]
        event = Validation(
            ValidationOptions(**options),
            items,
            batches,
            inputs=model,
            objective=model,
            report=lambda step, values: reports[rank].update(values, step=step),
            modules=[model.module],
            processes=Process(together, rank),
            stop=stop(rank),
        )
        try:
            event.run(MOMENT)
        except Stopped as error:
            return error
        return None

    with ThreadPoolExecutor(world) as pool:
        return reports, models, list(pool.map(one, range(world)))


def test_the_mean_is_over_pictures_and_sigmas() -> None:
    (values,), (model,), _ = validate(make_items(3))
    curve = [values[f"loss/validation_sigma_{sigma}"] for sigma in SIGMAS]
    assert values["loss/validation"] == pytest.approx(sum(curve) / 5) and values["step"] == 4
    assert model.calls == 3 * 5 and not any(model.seen) and model.module.training
    alone = [validate([item])[0][0]["loss/validation_sigma_0.7"] for item in make_items(3)]
    assert values["loss/validation_sigma_0.7"] == pytest.approx(sum(alone) / 3)
    assert len(set(alone)) == 3


@pytest.mark.parametrize("world", [2, 3, 7])
def test_any_number_of_processes_finds_the_same_bits(world: int) -> None:
    items = make_items(5)
    (one,), _, _ = validate(items)
    reports, models, _ = validate(items, world)
    assert reports == [one] * world
    rounds = -(-len(items) // world)
    assert [model.calls for model in models] == [rounds * 5] * world, "a sharded model needs all of them"


def test_other_pictures_and_the_order_do_not_touch_a_pictures_noise() -> None:
    items = make_items(4)
    (one,), _, _ = validate(items)
    (other,), _, _ = validate(items[::-1])
    assert one == pytest.approx(other, rel=1e-12)
    renumbered = [replace(item, path=Path(f"q/{item.index}.jpg")) for item in items]
    assert validate(renumbered)[0][0] == one
    assert validate([replace(item, digest="x" + item.digest) for item in items])[0][0] != one


def test_a_wish_of_one_process_to_stop_breaks_off_all_of_them() -> None:
    reports, models, raised = validate(make_items(9), 3, lambda rank: Stop(1 if rank == 1 else None))
    assert all(isinstance(error, Stopped) for error in raised)
    assert [model.calls for model in models] == [5, 5, 5] and reports == [{}, {}, {}]


@pytest.mark.parametrize(
    ("options", "due"),
    [
        ({}, {"epoch", "step 4 and epoch"}),
        ({"validate_every_n_steps": 4}, {"step 4", "step 4 and epoch"}),
        ({"validate_every_n_epochs": 2}, {"epoch", "step 4 and epoch"}),
        ({"validate_every_n_epochs": 3}, set()),
        (
            {"validate_every_n_steps": 4, "validate_every_n_epochs": 2},
            {"step 4", "epoch", "step 4 and epoch"},
        ),
        ({"validate_at_first": True, "validate_every_n_steps": 100}, {"start"}),
    ],
)
def test_when_it_is_due(options: dict[str, object], due: set[str]) -> None:
    moments = {
        "start": Moment(0, 0, False, False),
        "step 4": Moment(4, 2, False, False),
        "epoch": Moment(6, 2, True, False),
        "step 4 and epoch": Moment(8, 2, True, True),
    }
    event = Validation(ValidationOptions(**options), make_items(1), *[None] * 7)
    assert {name for name, moment in moments.items() if event.due(moment)} == due
    assert not any(replace(event, items=[]).due(moment) for moment in moments.values())


def test_so_many_batches_at_most() -> None:
    items = make_items(40) + make_items(40, batch_size=4, start=40)
    assert measured(items, None) == items
    few, more = measured(items, 3), measured(items[::-1], 10)
    assert sum(1 / item.dataset.batch_size for item in few) <= 3
    assert few == more[: len(few)], "chosen by content, not by place"
    assert {item.dataset.batch_size for item in more} == {1, 4}
    assert len(measured(make_items(9, batch_size=4), 2)) == 8
    assert len(measured(make_items(9), 100)) == 9


@pytest.mark.parametrize(
    "name", ["validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"]
)
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name} is 0; it must be 1 or more"):
        ValidationOptions(**{name: 0})


def test_flags_without_pictures_are_told() -> None:
    assert not list(ValidationOptions().without_pictures())
    (told,) = ValidationOptions(max_validation_steps=3).without_pictures()
    assert told.startswith("--max_validation_steps has no effect: no pictures are held out")
