"""Each item exactly `repeats` times an epoch, whatever the numbers; a step depends only on its number."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.items import (
    BucketOptions,
    CaptionOptions,
    Dataset,
    Geometry,
    ImageOptions,
    Item,
    Manifest,
    Subset,
)
from library.data.plan import Plan

BUCKETS = [(64, 64), (96, 48), (48, 96)]


def make_manifest(
    batch_sizes: list[int], pictures: list[tuple[int, int, int]], held_out: int = 0
) -> Manifest:
    """`pictures` are (dataset, bucket number, repeats); the last `held_out` are for validation."""
    subset = Subset("dreambooth", Path("p"), CaptionOptions(), ImageOptions())
    datasets = tuple(Dataset((subset,), BucketOptions((64, 64), True), size) for size in batch_sizes)
    items = tuple(
        Item(
            index=index,
            dataset=datasets[dataset],
            dataset_index=dataset,
            subset=subset,
            path=Path(f"p/{index}.png"),
            size=(64, 64),
            geometry=Geometry(BUCKETS[bucket], (0, 0), BUCKETS[bucket]),
            text="",
            repeats=repeats,
            digest=str(index),
        )
        for index, (dataset, bucket, repeats) in enumerate(pictures)
    )
    indices = tuple(range(len(items)))
    trained = len(items) - held_out
    return Manifest(datasets, items, indices[:trained], indices[trained:])


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    batch_sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    picture = st.tuples(st.integers(0, len(batch_sizes) - 1), st.integers(0, 2), st.integers(1, 4))
    pictures = draw(st.lists(picture, min_size=1, max_size=25))
    return make_manifest(batch_sizes, pictures, draw(st.integers(0, len(pictures) - 1)))


plans = st.builds(
    Plan, manifests(), seed=st.integers(0, 9), world=st.integers(1, 4), accumulation=st.integers(1, 5)
)


@settings(max_examples=60)
@given(plans, st.integers(0, 3))
def test_each_item_is_used_exactly_repeats_times_an_epoch(plan: Plan, epoch: int) -> None:
    first = epoch * plan.steps_per_epoch
    steps = [plan.step(step) for step in range(first, first + plan.steps_per_epoch)]
    uses = [(d.item, d.repeat) for micros in steps for micro in micros for d in micro.draws]
    wanted = [(i, r) for i in plan.manifest.train for r in range(plan.manifest.items[i].repeats)]
    assert sorted(uses) == wanted
    assert plan.draws_per_epoch == len(wanted)
    assert plan.batches_per_epoch == sum(map(len, steps))


@settings(max_examples=60)
@given(plans, st.integers(0, 100))
def test_batches_hold_one_bucket_and_are_split_over_the_processes(plan: Plan, step: int) -> None:
    micros = plan.step(step)
    assert 1 <= len(micros) <= plan.accumulation
    for micro_number, micro in enumerate(micros):
        items = [plan.manifest.items[draw.item] for draw in micro.draws]
        assert len({(item.dataset_index, item.geometry.bucket) for item in items}) == 1
        assert len(items) <= items[0].dataset.batch_size * plan.world
        parts = micro.parts
        assert sorted(d.slot for part in parts for d in part) == list(range(len(items)))
        assert max(map(len, parts)) <= items[0].dataset.batch_size
        for slot, draw in enumerate(micro.draws):
            assert (draw.slot, draw.step, draw.micro) == (slot, step, micro_number)
            assert draw.epoch == step // plan.steps_per_epoch


@settings(max_examples=40)
@given(manifests(), st.integers(0, 9), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_step_depends_on_nothing_that_was_asked_before(
    manifest: Manifest, seed: int, asked: list[int]
) -> None:
    used = Plan(manifest, seed=seed, world=2, accumulation=2)
    for step in asked:
        assert used.step(step) == Plan(manifest, seed=seed, world=2, accumulation=2).step(step)


@settings(max_examples=40)
@given(manifests(), st.integers(0, 5))
def test_two_processes_share_the_same_batches_as_one_with_twice_the_size(
    manifest: Manifest, step: int
) -> None:
    doubled = make_manifest(
        [2 * dataset.batch_size for dataset in manifest.datasets],
        [(i.dataset_index, BUCKETS.index(i.geometry.bucket), i.repeats) for i in manifest.items],
        len(manifest.validation),
    )
    two, one = Plan(manifest, seed=3, world=2).step(step), Plan(doubled, seed=3, world=1).step(step)
    assert [micro.draws for micro in two] == [micro.draws for micro in one]


def test_order_changes_with_epoch_and_seed() -> None:
    manifest = make_manifest([2], [(0, 0, 1)] * 20)

    def order(seed: int, epoch: int) -> list[int]:
        plan = Plan(manifest, seed=seed)
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        return [draw.item for step in steps for micro in plan.step(step) for draw in micro.draws]

    orders = [order(0, 0), order(0, 1), order(1, 0), list(range(20))]
    assert len({tuple(o) for o in orders}) == 4


def test_every_picture_comes_once_before_any_comes_again_within_a_bucket() -> None:
    whole = Plan(make_manifest([21], [(0, 0, 3)] * 7), seed=5).step(0)[0]
    assert [draw.repeat for draw in whole.draws] == [0] * 7 + [1] * 7 + [2] * 7
