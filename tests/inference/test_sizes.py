"""How large a picture is drawn when nobody says it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.inference.sizes import sized
from library.options.inference_kandinsky5 import SIZES
from library.options.request import ImageRequest

SIDES = st.none() | st.integers(1, 128).map(lambda n: 16 * n)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, (1024, 1024)),
        ((10, 10), (1024, 1024)),
        ((1500, 1000), (1280, 768)),
        ((1000, 1500), (768, 1280)),
        ((4, 3), (1152, 896)),
        ((3, 4), (896, 1152)),
        ((8000, 10), (1408, 640)),
        ((1, 999), (640, 1408)),
    ],
)
def test_the_usual_size_with_the_nearest_proportions(
    source: tuple[int, int] | None, expected: tuple[int, int]
) -> None:
    found = sized(ImageRequest(width=None, height=None), SIZES, source)
    assert (found.width, found.height) == expected


@pytest.mark.parametrize(
    ("given", "source", "expected"),
    [
        ((512, None), None, (512, 1024)),
        ((None, 512), None, (1024, 512)),
        ((512, None), (1500, 1000), (512, 336)),
        ((None, 512), (1500, 1000), (768, 512)),
        ((64, None), (999, 1), (64, 16)),
        ((48, 80), (1500, 1000), (48, 80)),
    ],
)
def test_a_side_that_is_given_stays(given: tuple, source: tuple | None, expected: tuple) -> None:
    found = sized(ImageRequest(width=given[0], height=given[1]), SIZES, source)
    assert (found.width, found.height) == expected


@given(SIDES, SIDES, st.none() | st.tuples(st.integers(1, 20000), st.integers(1, 20000)))
def test_every_size_can_be_drawn(width: int | None, height: int | None, source: tuple | None) -> None:
    found = sized(ImageRequest(width=width, height=height), SIZES, source)
    assert found.width % 16 == 0 < found.width and found.height % 16 == 0 < found.height
    assert width in (None, found.width) and height in (None, found.height)
