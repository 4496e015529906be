"""Flags of block swap that ask for too much, or for nothing."""

import pytest

from library.core.errors import ConfigError
from library.options.swap import SwapOptions


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"blocks_to_swap": -1}, "--blocks_to_swap is -1; it must be 0 or more"),
        ({"block_swap_ring_size": 0}, "--block_swap_ring_size is 0; it must be 1 or more"),
    ],
)
def test_values_that_cannot_be(values, told):
    with pytest.raises(ConfigError, match=told):
        SwapOptions(**values)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, []),
        ({"blocks_to_swap": 0}, []),
        ({"blocks_to_swap": 3}, []),
        ({"use_pinned_memory_for_block_swap": True}, ["--use_pinned_memory_for_block_swap has no effect"]),
        ({"block_swap_ring_size": 3}, ["--block_swap_ring_size has no effect"]),
        ({"blocks_to_swap": 2}, ["--blocks_to_swap 2 saves no memory"]),
        ({"blocks_to_swap": 3, "block_swap_ring_size": 4}, ["--blocks_to_swap 3 saves no memory"]),
    ],
)
def test_what_has_no_effect_is_told(values, told):
    sentences = list(SwapOptions(**values).adjustments())
    assert len(sentences) == len(told)
    assert all(sentence.startswith(start) for sentence, start in zip(sentences, told, strict=True))


def test_more_blocks_than_the_model_has():
    SwapOptions(blocks_to_swap=6).check(6)
    with pytest.raises(ConfigError, match="--blocks_to_swap is 7, but the model has 6 blocks"):
        SwapOptions(blocks_to_swap=7).check(6)
