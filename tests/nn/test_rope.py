"""Rotary tables and their application."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.nn.rope import ApartRopeTables, RopeTables, rotate

CPU = torch.device("cpu")


def test_the_table_is_the_complex_exponential_of_the_positions():
    axes, theta, caption, height, width = (8, 6, 4), 10000.0, 5, 3, 4
    positions = [(i, 0, 0) for i in range(caption)]
    positions += [(caption, row, column) for row in range(height) for column in range(width)]
    expected = []
    for position in positions:
        angles = [
            m * theta ** (-2 * p / d) for m, d in zip(position, axes, strict=True) for p in range(d // 2)
        ]
        expected.append(
            torch.polar(torch.ones(len(angles), dtype=torch.float64), torch.tensor(angles).double())
        )
    table = RopeTables(axes, theta).sample(caption, height, width, CPU)
    assert table.dtype == torch.float32 and table.shape == (17, 9, 2)
    torch.testing.assert_close(
        torch.view_as_complex(table.double()), torch.stack(expected), rtol=0, atol=1e-7
    )


def test_far_positions_are_exact_to_fp32():
    """Angles in fp32 would be wrong by 1e-5 and more at position 400."""
    table = RopeTables((32, 2, 2), 10000.0).sample(500, 1, 1, CPU)
    angles = torch.outer(
        torch.arange(500, dtype=torch.float64), 10000.0 ** (-torch.arange(0, 32, 2).double() / 32)
    )
    assert (table[:500, :16, 0].double() - angles.cos()).abs().max() < 6e-8


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 400))
def test_scores_depend_on_distance_alone(first, second, shift):
    table = RopeTables((16, 2, 2), 10000.0).sample(801, 1, 1, CPU)
    q, k = (torch.randn(1, 1, 20, generator=torch.Generator().manual_seed(s)) for s in (0, 1))

    def score(m, n):
        return (rotate(q, table[m : m + 1]) * rotate(k, table[n : n + 1])).sum()

    torch.testing.assert_close(score(first, second), score(first + shift, second + shift), rtol=0, atol=2e-5)


def test_a_table_is_made_once_and_old_ones_are_dropped():
    tables = RopeTables((4, 2, 2), 10000.0)
    first = tables.sample(3, 2, 2, CPU)
    assert tables.sample(3, 2, 2, CPU) is first
    assert tables.sample(4, 2, 2, CPU) is not first
    for length in range(10, 100):
        tables.sample(length, 2, 2, CPU)
    assert tables.sample(3, 2, 2, CPU) is not first
    assert tables.sample(99, 2, 2, CPU) is tables.sample(99, 2, 2, CPU)


def test_texts_and_images_apart():
    """A text has one axis as wide as all of an image's; an image's first axis does not turn."""
    axes, theta = (8, 6, 4), 10000.0
    tables = ApartRopeTables(axes, theta)
    text, image = tables.text(50, CPU), tables.image(3, 4, CPU)
    assert text.dtype == image.dtype == torch.float32
    assert text.shape == (50, 9, 2) and image.shape == (12, 9, 2)
    exact = torch.outer(torch.arange(50.0).double(), theta ** (-torch.arange(0, 18, 2).double() / 18))
    assert (text.double() - torch.stack((exact.cos(), exact.sin()), -1)).abs().max() < 4e-6
    assert torch.equal(image[:, :4], torch.tensor([1.0, 0.0]).expand(12, 4, 2))
    joined = RopeTables(axes, theta).sample(0, 3, 4, CPU)
    torch.testing.assert_close(image, joined, rtol=0, atol=1e-6)
    assert tables.text(50, CPU) is text and tables.image(3, 4, CPU) is image
