"""What is held out hangs on each picture's content, and what is held out is trained on nowhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.core.errors import DataError
from library.data.items import BucketOptions, CaptionOptions, Dataset, Geometry, ImageOptions, Item, Subset
from library.data.split import Split, first_of, held_out, split

digests = st.lists(st.text("0123456789abcdef", min_size=8, max_size=8), unique=True, max_size=40)
shares = st.floats(0, 1)
seeds = st.none() | st.integers(0, 5)
SQUARE = Geometry((64, 64), (0, 0), (64, 64))


@given(digests, digests, shares, seeds)
def test_adding_pictures_moves_none_of_a_share(
    old: list[str], new: list[str], share: float, seed: int | None
) -> None:
    before = {digest for digest in old if held_out(digest, share, seed)}
    after = {digest for digest in reversed(old + new) if held_out(digest, share, seed)}
    assert before == after & set(old)


@given(digests, shares, shares)
def test_a_larger_share_only_adds(old: list[str], one: float, other: float) -> None:
    small, large = sorted((one, other))
    chosen = {digest for digest in old if held_out(digest, small, 0)}
    assert chosen <= {digest for digest in old if held_out(digest, large, 0)}


def test_the_share_is_met_on_average_and_the_seed_chooses_others() -> None:
    digests = [f"{n:064x}" for n in range(4000)]
    first = {digest for digest in digests if held_out(digest, 0.25, None)}
    second = {digest for digest in digests if held_out(digest, 0.25, 1)}
    assert abs(len(first) - 1000) < 120 and abs(len(second) - 1000) < 120
    assert abs(len(first & second) - 250) < 80
    assert first == {digest for digest in digests if held_out(digest, 0.25, 0)}


def test_the_ends_of_the_scale() -> None:
    assert not held_out("a", 0.0, None)
    assert held_out("a", 1.0, None)


@given(digests, st.integers(0, 40), st.integers(0, 40), seeds)
def test_a_number_is_met_exactly_and_a_larger_one_only_adds(
    contents: list[str], one: int, other: int, seed: int | None
) -> None:
    small, large = sorted((one, other))
    chosen = first_of(contents, small, seed)
    assert len(chosen) == min(small, len(contents))
    assert chosen <= first_of(reversed(contents + contents[:3]), large, seed)


@given(digests, st.integers(0, 40), seeds)
def test_a_number_chooses_as_a_share_does(contents: list[str], count: int, seed: int | None) -> None:
    """So going from one to the other moves as few pictures as can be."""
    chosen = first_of(contents, count, seed)
    for share in (0.1, 0.5, 0.9):
        of_share = {digest for digest in contents if held_out(digest, share, seed)}
        assert chosen <= of_share or of_share <= chosen


# --- over datasets ---


@dataclass(frozen=True)
class Folder:
    """A dataset of one subset; `contents` are its pictures' digests."""

    contents: list[str]
    share: float = 0.0
    count: int = 0
    seed: int | None = None
    validation: bool = False
    is_reg: bool = False


def split_of(*folders: Folder) -> Split:
    items, contents = [], {}
    for number, folder in enumerate(folders):
        subset = Subset(
            "dreambooth",
            Path(str(number)),
            CaptionOptions(),
            ImageOptions(),
            is_reg=folder.is_reg,
            validation_split=folder.share,
        )
        dataset = Dataset(
            (subset,),
            BucketOptions((64, 64)),
            validation=folder.validation,
            validation_count=folder.count,
            validation_seed=folder.seed,
        )
        for content in folder.contents:
            path = Path(f"{number}/{content}.png")
            item = Item(-1, dataset, number, subset, path, (64, 64), SQUARE, "", 1, content + " with a mask")
            items.append(item)
            contents[path] = content
    return split(items, contents)


def names(parts: Split, *, held: bool) -> list[str]:
    return [str(item.path) for item in parts.items if item.held_out == held]


folders = st.lists(
    st.builds(
        Folder,
        st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1),
        share=st.sampled_from([0.0, 0.3, 1.0]),
        count=st.integers(0, 2),
        seed=seeds,
        validation=st.booleans(),
        is_reg=st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@given(folders)
def test_nothing_is_trained_on_and_validated_on(given: list[Folder]) -> None:
    try:
        parts = split_of(*given)
    except DataError:
        return
    trained = {Path(name).stem for name in names(parts, held=False)}
    held = {Path(name).stem for name in names(parts, held=True)}
    assert trained and not trained & held
    everything = {content for folder in given for content in folder.contents}
    assert trained | held == everything


def test_a_dataset_for_validation_takes_its_pictures_out_of_training() -> None:
    parts = split_of(Folder(["a", "b", "c"]), Folder(["c", "d"], validation=True), Folder(["c"], is_reg=True))
    assert names(parts, held=False) == ["0/a.png", "0/b.png"]
    assert names(parts, held=True) == ["1/c.png", "1/d.png"]
    told = "has copies of pictures that are held out for validation; they are not trained on: c.png."
    assert parts.notes == (f"datasets[0] {told}", f"datasets[2] {told}")


def test_what_a_dataset_for_validation_has_is_not_chosen_again() -> None:
    for seed in range(8):
        parts = split_of(Folder(["a", "b", "c"], count=1, seed=seed), Folder(["b", "x"], validation=True))
        (chosen,) = (name for name in names(parts, held=True) if name.startswith("0/"))
        assert chosen in ("0/a.png", "0/c.png")
        assert len(names(parts, held=False)) == 1


def test_a_share_holds_out_copies_in_all_datasets_but_validates_no_regularisation_picture() -> None:
    parts = split_of(Folder(["a"], share=1.0), Folder(["a", "b"]), Folder(["a", "b"], is_reg=True))
    assert names(parts, held=True) == ["0/a.png", "1/a.png"]
    assert names(parts, held=False) == ["1/b.png", "2/b.png"]


def test_a_number_counts_different_pictures_of_each_dataset() -> None:
    many, more = [f"{n}" for n in range(9)], [f"x{n}" for n in range(9)]
    parts = split_of(Folder(many, count=3), Folder(more, count=2), Folder(more, count=2))
    held = names(parts, held=True)
    assert [sum(name.startswith(f"{n}/") for name in held) for n in range(3)] == [3, 2, 2]
    assert [Path(name).name for name in held[3:5]] == [Path(name).name for name in held[5:]]
    others = names(split_of(Folder(many, count=3, seed=1), Folder(more)), held=True)
    assert len(others) == 3 and others != held[:3]


def test_a_share_holds_out_one_at_least() -> None:
    few = ["a", "b", "c", "d"]
    held = names(split_of(Folder(few, share=0.001)), held=True)
    assert len(held) == 1
    larger = next(
        share / 20
        for share in range(1, 20)
        if len(names(split_of(Folder(few, share=share / 20)), held=True)) > 1
    )
    assert set(held) < set(names(split_of(Folder(few, share=larger)), held=True))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((Folder(["a"], share=0.001),), "holds out all pictures"),
        ((Folder(["a"], share=1.0),), "holds out all pictures"),
        ((Folder(["a"]), Folder(["a"], validation=True)), "holds out all pictures"),
        ((Folder(["a", "b"], share=1.0), Folder(["c"], is_reg=True)), "holds out all pictures"),
        (
            (Folder(["a"]), Folder(["b", "c"], count=3)),
            "validation_count of datasets[1] is 3, but it has only 2",
        ),
    ],
)
def test_what_cannot_be(given: tuple[Folder, ...], words: str) -> None:
    with pytest.raises(DataError) as caught:
        split_of(*given)
    assert words in str(caught.value)


def test_a_seed_without_anything_to_choose_is_told() -> None:
    (note,) = split_of(Folder(["a"], seed=3)).notes
    assert note.startswith("validation_seed has no effect")
    assert not split_of(Folder(["a", "b"], seed=3, count=1)).notes
