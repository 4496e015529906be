"""The validation split depends on each picture's content and on nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from library.data.split import held_out, held_out_digests

digests = st.lists(st.text("0123456789abcdef", min_size=8, max_size=8), unique=True, max_size=40)
shares = st.floats(0, 1)


@given(digests, digests, shares, st.none() | st.integers(0, 5))
def test_adding_pictures_moves_none(old: list[str], new: list[str], share: float, seed: int | None) -> None:
    before = held_out_digests((digest, share, seed) for digest in old)
    after = held_out_digests((digest, share, seed) for digest in reversed(old + new))
    assert before == after & set(old)


@given(digests, shares, shares)
def test_a_larger_share_only_adds(old: list[str], one: float, other: float) -> None:
    small, large = sorted((one, other))
    chosen = held_out_digests((digest, small, 0) for digest in old)
    assert chosen <= held_out_digests((digest, large, 0) for digest in old)


@given(digests, shares, shares)
def test_copies_are_never_on_both_sides(old: list[str], one: float, other: float) -> None:
    uses = [(digest, share, seed) for digest in old for share, seed in ((one, 0), (other, 3))]
    chosen = held_out_digests(uses)
    assert chosen == {digest for digest, share, seed in uses if held_out(digest, share, seed)}


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
