"""Captions: what each option does to a text, and that cached variants hold everything that can be drawn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.buckets import cover
from library.data.captions import caption_variants, draw_caption
from library.data.items import BucketOptions, CaptionOptions, Dataset, ImageOptions, Item, Subset

TAGS = "a, b, c, d, e"


def make_item(text: str, index: int = 0, **options: object) -> Item:
    subset = Subset("dreambooth", Path("p"), CaptionOptions(**options), ImageOptions())
    dataset = Dataset((subset,), BucketOptions((64, 64)))
    size = (64, 64)
    return Item(index, dataset, 0, subset, Path("p/x.png"), size, cover(size, size), text, 1, "digest")


def draw(item: Item, epoch: int = 0, step: int = 0, max_variants: int | None = None, **more: int) -> str:
    place = {"seed": 0, "repeat": 0, "total_steps": 100} | more
    return draw_caption(item, epoch=epoch, step=step, max_variants=max_variants, **place)


def draws(item: Item, count: int = 200, **more: int) -> list[str]:
    return [draw(item, epoch=epoch, **more) for epoch in range(count)]


def test_a_plain_caption_stays_as_it_was_written() -> None:
    assert draw(make_item("A cat, sitting;  by  the {door}.")) == "A cat, sitting;  by  the {door}."


def test_only_the_first_line_counts_without_wildcards() -> None:
    assert set(draws(make_item("\n first one \nsecond"))) == {"first one"}


def test_each_line_is_drawn_equally_often_with_wildcards() -> None:
    counts = Counter(draws(make_item("one\n\ntwo\nthree", enable_wildcard=True), 900))
    assert set(counts) == {"one", "two", "three"} and min(counts.values()) > 230


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a {red|blue} cat", {"a red cat", "a blue cat"}),
        ("{a|b} and {c|d}", {"a and c", "a and d", "b and c", "b and d"}),
        ("{{retro style}}", {"{retro style}"}),
        ("{{{x|y}}}", {"{x}", "{y}"}),
        ("{only}", {"only"}),
        ("{|very} big", {"big", "very big"}),
        ("{} and {", {"{} and {"}),
    ],
)
def test_wildcards(text: str, wanted: set[str]) -> None:
    item = make_item(text, enable_wildcard=True)
    assert set(draws(item)) == wanted == set(caption_variants(item, 16))


def test_prefix_and_suffix_go_around_the_chosen_line_and_take_part_in_wildcards() -> None:
    item = make_item(
        "one\ntwo", enable_wildcard=True, caption_prefix="{a|b} photo,", caption_suffix=", sharp"
    )
    wanted = {f"{p} photo, {line} , sharp" for p in "ab" for line in ("one", "two")}
    assert set(draws(item)) == wanted
    assert draw(make_item("", caption_prefix="photo")) == "photo"


def test_shuffling_keeps_the_first_tags_in_place() -> None:
    item = make_item(TAGS, shuffle_caption=True, keep_tokens=2)
    drawn = set(draws(item))
    assert {caption[:6] for caption in drawn} == {"a, b, "}
    assert {tuple(sorted(caption.split(", "))) for caption in drawn} == {("a", "b", "c", "d", "e")}
    assert len(drawn) == 6


def test_keep_tokens_separator_fixes_both_ends_and_is_removed() -> None:
    text = "x, y ||| a, b, c ||| z"
    options = {"keep_tokens_separator": "|||", "keep_tokens": 5}
    assert draw(make_item(text, **options)) == "x, y, a, b, c, z"
    drawn = set(draws(make_item(text, shuffle_caption=True, **options)))
    assert len(drawn) == 6
    assert all(caption.startswith("x, y, ") and caption.endswith(", z") for caption in drawn)
    assert draw(make_item("x ||| a", **options)) == "x, a"


def test_secondary_separator_keeps_tags_together() -> None:
    item = make_item("sky;;;cloud;;;day, a, b", secondary_separator=";;;", shuffle_caption=True)
    drawn = set(draws(item))
    assert len(drawn) == 6
    assert all("sky,cloud,day" in caption and ";" not in caption for caption in drawn)
    assert draw(make_item("a;;;b c", secondary_separator=";;;")) == "a,b c"


def test_tag_dropout_spares_fixed_tags_and_meets_its_rate() -> None:
    item = make_item(TAGS, caption_tag_dropout_rate=0.3, keep_tokens=1)
    counts = Counter(tag for caption in draws(item, 1000) for tag in caption.split(", "))
    assert counts["a"] == 1000
    assert all(620 < counts[tag] < 780 for tag in "bcde")
    assert all(caption == ", ".join(sorted(caption.split(", "))) for caption in draws(item))


def test_caption_dropout_meets_its_rate_and_its_epochs() -> None:
    assert 130 < draws(make_item("a", caption_dropout_rate=0.3), 600).count("") < 230
    assert draws(make_item("a", caption_dropout_every_n_epochs=3), 7) == ["a", "a", "", "a", "a", "", "a"]
    assert set(draws(make_item("a", caption_dropout_rate=1.0))) == {""}


def test_token_warmup_adds_tags_in_their_order_with_the_steps() -> None:
    item = make_item(TAGS, token_warmup_step=8.0)
    lengths = [len(draw(item, step=step).split(", ")) for step in range(10)]
    assert lengths == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert draw(item, step=4) == "a, b, c"


def test_a_token_warmup_below_one_is_a_share_of_all_steps() -> None:
    share = make_item(TAGS, token_warmup_step=0.5)
    steps = make_item(TAGS, token_warmup_step=10.0)
    for step in range(20):
        assert draw(share, step=step, total_steps=20) == draw(steps, step=step)


def test_token_warmup_with_fewer_tags_than_its_start_uses_all() -> None:
    item = make_item("a, b", token_warmup_step=100.0, token_warmup_min=4)
    assert {draw(item, step=step) for step in range(120)} == {"a, b"}


def test_draws_depend_on_seed_epoch_item_and_repeat_alone() -> None:
    text = ", ".join("abcdefgh")
    item = make_item(text, shuffle_caption=True)
    assert draw(item) == draw(make_item(text, shuffle_caption=True))
    others = [draw(item, epoch=1), draw(item, seed=1), draw(item, repeat=1)]
    others.append(draw(make_item(text, index=1, shuffle_caption=True)))
    assert len({draw(item), *others}) == 5


def test_variants_are_the_same_for_every_seed_and_index() -> None:
    one, other = (make_item(TAGS, index, shuffle_caption=True) for index in (0, 7))
    assert caption_variants(one, 8) == caption_variants(other, 8)
    assert {draw(one, epoch, seed=1, max_variants=8) for epoch in range(99)} == set(caption_variants(one, 8))
    assert {draw(one, epoch, seed=2, max_variants=8) for epoch in range(99)} == set(caption_variants(one, 8))


def test_a_sentence_that_nothing_can_change_is_one_variant() -> None:
    assert caption_variants(make_item("a cat", shuffle_caption=True), 16) == ("a cat",)
    assert caption_variants(make_item("a cat"), 16) == ("a cat",)


def test_few_variants_are_enumerated_and_many_are_capped() -> None:
    few = make_item("{1|2|3|4} {1|2|3|4}", enable_wildcard=True)
    assert len(caption_variants(few, 16)) == 16
    assert 1 < len(caption_variants(few, 15)) <= 15
    assert len(caption_variants(make_item(" ".join(["{0|1}"] * 99), enable_wildcard=True), 5)) == 5


words = st.sampled_from(["a", "b", "cat", "a {red|blue} dog", "{x|y|z}", "{{esc}}", "p;;;q", ""])
lines = st.lists(words, max_size=6).map(", ".join)
texts = st.lists(lines, max_size=3).map("\n".join) | st.text("ab,;|{}\n ", max_size=30)
captions = st.fixed_dictionaries(
    {},
    optional={
        "caption_prefix": st.sampled_from(["photo,", "art ||| "]),
        "caption_suffix": st.sampled_from([", sharp", " ||| end"]),
        "shuffle_caption": st.booleans(),
        "keep_tokens": st.integers(0, 3),
        "keep_tokens_separator": st.just("|||"),
        "secondary_separator": st.just(";;;"),
        "enable_wildcard": st.booleans(),
        "caption_dropout_rate": st.sampled_from([0.0, 0.5]),
        "caption_dropout_every_n_epochs": st.integers(0, 3),
        "caption_tag_dropout_rate": st.sampled_from([0.0, 0.5]),
        "token_warmup_min": st.integers(0, 3),
        "token_warmup_step": st.sampled_from([0.0, 0.5, 10.0]),
    },
)


@settings(max_examples=150)
@given(texts, captions, st.integers(1, 6), st.integers(0, 3))
def test_every_draw_is_among_the_variants(text: str, options: dict, most: int, seed: int) -> None:
    item = make_item(text, **options)
    variants = caption_variants(item, most)
    assert len(set(variants)) == len(variants)
    if not options.get("token_warmup_step"):
        assert len(variants) <= most + 1
    for number in range(12):
        caption = draw(
            item, number // 2, step=number, total_steps=16, seed=seed, repeat=number, max_variants=most
        )
        assert caption in variants


@settings(max_examples=100)
@given(st.lists(st.sampled_from("abcdefg"), min_size=1, unique=True), st.integers(0, 8), st.integers(0, 50))
def test_kept_tags_stay_and_none_is_lost_by_shuffling(tags: list[str], keep: int, epoch: int) -> None:
    item = make_item(",".join(tags), shuffle_caption=True, keep_tokens=keep)
    drawn = draw(item, epoch).split(", ")
    assert drawn[:keep] == tags[:keep]
    assert sorted(drawn) == sorted(tags)


# --- held-out pictures ---


drawn = {
    "shuffle_caption": True,
    "caption_dropout_rate": 1.0,
    "caption_dropout_every_n_epochs": 1,
    "caption_tag_dropout_rate": 0.9,
    "token_warmup_step": 50.0,
}


def held(text: str, index: int = 0, **options: object) -> Item:
    return replace(make_item(text, index, **options), held_out=True)


def test_a_held_out_picture_has_all_its_tags_in_order() -> None:
    item = held("a,b,  c ||| d", keep_tokens_separator="|||", caption_prefix="x,", **drawn)
    assert draws(item, 3) == ["x, a, b, c, d"] * 3
    assert caption_variants(item, 5) == ("x, a, b, c, d",)


def test_a_held_out_caption_is_written_as_in_training() -> None:
    """Tags are joined anew where training does so, and the text is left alone where training leaves it."""
    for options in ({}, {"shuffle_caption": True}):
        (trained,) = {draw(make_item("one,two", **options), epoch=e) for e in range(40)} - {"two, one"}
        assert draw(held("one,two", **options)) == trained


def test_a_held_out_caption_is_drawn_once_and_for_all() -> None:
    """Whatever the seed, the epoch, the other pictures, and how many variants are cached."""
    text = "{red|blue|green|black|white} {cat|dog|bird}, {day|night}\nsecond line"
    item, options = held(text, 0, enable_wildcard=True, **drawn), {"enable_wildcard": True}
    texts = {
        draw(item, epoch=e, seed=s, max_variants=m) for e in (0, 1) for s in (0, 1) for m in (None, 2, 99)
    }
    texts |= {draw(held(text, 7, **options)), *caption_variants(item, 1), *caption_variants(item, 99)}
    assert len(texts) == 1
    assert texts <= set(caption_variants(make_item(text, **options), 1000))
    others = {draw(held(f"{text} {n}", **options)).split()[0] for n in range(40)}
    assert len(others) > 3
