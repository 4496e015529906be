"""Tiles put together again."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from library.nn.tiling import map_tiles


@st.composite
def cases(draw):
    tile = draw(st.integers(2, 9))
    return {
        "size": (draw(st.integers(1, 25)), draw(st.integers(1, 25))),
        "tile": tile,
        "overlap": draw(st.integers(0, tile - 1)),
        "stride": draw(st.sampled_from([1, 2, 8])),
    }


@given(cases())
def test_a_function_of_single_places_is_exact(case):
    def enlarge(x):
        shapes.append(x.shape[2:])
        return torch.kron(x * 3 + 1, torch.ones(case["stride"], case["stride"]))

    shapes = []
    x = torch.randn((2, 3, *case["size"]), generator=torch.Generator().manual_seed(0))
    tiled = map_tiles(enlarge, x, tile=case["tile"], overlap=case["overlap"], stride=case["stride"])
    assert all(max(shape) <= case["tile"] for shape in shapes)
    torch.testing.assert_close(tiled, enlarge(x))


def test_seams_fade():
    """Tiles that disagree by a constant are joined without a step."""
    levels = iter([0.0, 1.0])
    x = torch.zeros(1, 1, 4, 24)
    tiled = map_tiles(lambda part: part + next(levels), x, tile=16, overlap=8, stride=1)
    row = tiled[0, 0, 0]
    assert row[0] == 0 and row[-1] == 1
    assert row.diff().max() < 0.13
