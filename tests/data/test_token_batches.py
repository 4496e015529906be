"""Batches filled by tokens: every use once, never too many tokens, as many batches in every epoch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.core.errors import ConfigError
from library.data.items import (
    BucketOptions,
    CaptionOptions,
    Dataset,
    Geometry,
    ImageOptions,
    Item,
    Manifest,
    MicroBatch,
    Subset,
)
from library.data.plan import Plan
from library.data.token_batches import TokenBudget, fill

STRIDE = 16
SIDES = [(n, m) for n in range(1, 5) for m in range(1, 5)]  # in tokens
MULTIPLIERS = (1.0, 0.5, 1.0)  # of datasets 0, 1 and 2
Picture = tuple[int, tuple[int, int], int]  # dataset, sides in tokens, repeats


def make_manifest(pictures: list[Picture]) -> Manifest:
    subset = Subset("dreambooth", Path("p"), CaptionOptions(), ImageOptions())
    dataset = Dataset((subset,), BucketOptions((64, 64), True), 1)
    datasets = tuple(replace(dataset, network_multiplier=multiplier) for multiplier in MULTIPLIERS)
    items = []
    for index, (number, (columns, rows), repeats) in enumerate(pictures):
        size = (columns * STRIDE, rows * STRIDE)
        place = Geometry(size, (0, 0), size)
        path = Path(f"p/{index}.png")
        items.append(
            Item(index, datasets[number], number, subset, path, size, place, "", repeats, str(index))
        )
    return Manifest(datasets, tuple(items), tuple(range(len(items))), ())


pictures = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(SIDES), st.integers(1, 3)), min_size=1, max_size=25
)
worlds = st.integers(1, 3)


def plan_of(manifest: Manifest, world: int, *, limit: int = 16, accumulation: int = 1) -> Plan:
    budget = TokenBudget(limit, STRIDE)
    return Plan(manifest, seed=4, world=world, accumulation=accumulation, budget=budget)


def epoch_of(plan: Plan, epoch: int) -> list[MicroBatch]:
    first = epoch * plan.steps_per_epoch
    return [micro for step in range(first, first + plan.steps_per_epoch) for micro in plan.step(step)]


def tokens_of(plan: Plan, item: int) -> int:
    width, height = plan.manifest.items[item].geometry.bucket
    return width * height // STRIDE**2


@settings(max_examples=60)
@given(pictures, worlds, st.integers(16, 40), st.integers(1, 3), st.integers(0, 3))
def test_an_epoch_uses_every_picture_within_the_limit(
    pictures: list[Picture], world: int, limit: int, accumulation: int, epoch: int
) -> None:
    plan = plan_of(make_manifest(pictures), world, limit=limit, accumulation=accumulation)
    batches = epoch_of(plan, epoch)
    uses = sorted((draw.item, draw.repeat) for micro in batches for draw in micro.draws)
    assert uses == [(i, r) for i, (*_, repeats) in enumerate(pictures) for r in range(repeats)]
    assert plan.batches_per_epoch == len(batches) and plan.draws_per_epoch == len(uses)
    for micro in batches:
        assert len(micro.parts) == world and micro.draws
        assert [draw.slot for draw in micro.draws] == list(range(len(micro.draws)))
        assert len({plan.manifest.items[d.item].dataset.network_multiplier for d in micro.draws}) == 1
        for part in micro.parts:
            assert sum(tokens_of(plan, draw.item) for draw in part) <= limit
    parts = [part for micro in batches for part in micro.parts]
    assert_heaviest(plan, {(sum(tokens_of(plan, draw.item) for draw in part), len(part)) for part in parts})


def assert_heaviest(plan: Plan, batches: set[tuple[int, int]]) -> None:
    """`batches`: tokens and pictures of each. Most tokens first; none than which another has more of both."""
    heaviest = [(sum(w * h for w, h in sizes) // STRIDE**2, len(sizes)) for sizes in plan.heaviest_batches]
    assert heaviest == sorted(
        (
            (tokens, count)
            for tokens, count in batches
            if not any(
                other != (tokens, count) and other[0] >= tokens and other[1] >= count for other in batches
            )
        ),
        reverse=True,
    )


@settings(max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(30, 90))
def test_batches_are_few_and_full(tokens: list[int], limit: int) -> None:
    batches = fill(tokens, limit)
    assert Counter(number for batch in batches for number in batch) == Counter(tokens)
    assert all(sum(batch) <= limit for batch in batches)
    halves = [sum(batch) for batch in batches if 2 * sum(batch) <= limit]
    assert len(halves) <= 1, "two batches that are half empty would have been one"


@settings(max_examples=30)
@given(pictures, worlds, st.integers(0, 50))
def test_a_step_depends_on_its_number_only(pictures: list[Picture], world: int, step: int) -> None:
    manifest = make_manifest(pictures)
    used = plan_of(manifest, world)
    for earlier in range(0, step, 7):
        used.step(earlier)
    assert used.step(step) == plan_of(manifest, world).step(step)


def test_sizes_share_a_batch_and_partners_change() -> None:
    """One picture of 12 tokens, and four of 4: who is with the large one is drawn anew in each epoch."""
    plan = plan_of(make_manifest([(0, (4, 3), 1)] + [(2, (2, 2), 1)] * 4), world=1)
    assert plan.batches_per_epoch == 2
    partners = set()
    for epoch in range(12):
        (with_large,) = [micro for micro in epoch_of(plan, epoch) if any(d.item == 0 for d in micro.draws)]
        assert len(with_large.draws) == 2
        partners |= {draw.item for draw in with_large.draws} - {0}
    assert partners == {1, 2, 3, 4}


def test_a_picture_that_does_not_fit_is_told_with_its_size() -> None:
    manifest = make_manifest([(0, (2, 2), 1), (0, (4, 3), 1)])
    TokenBudget(12, STRIDE).check(manifest)
    with pytest.raises(ConfigError, match="max_batch_tokens is 11, but a picture of 64x48 has 12 tokens"):
        TokenBudget(11, STRIDE).check(manifest)


def test_many_pictures_are_dealt_out_quickly() -> None:
    tokens = [64 + number % 40 for number in range(50_000)]
    batches = fill(tokens, 512)
    assert sum(map(len, batches)) == 50_000 and len(batches) < 1.1 * sum(tokens) / 512
