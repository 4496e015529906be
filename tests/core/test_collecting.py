"""The collector of cycles comes back, whatever happens meanwhile."""

import gc

import pytest

from library.core.collecting import uncollected


def test_it_is_left_out_and_comes_back():
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()  # the outer one is not over
    assert gc.isenabled()


def test_it_comes_back_after_a_mistake():
    with pytest.raises(ValueError, match="a mistake"), uncollected():
        raise ValueError("a mistake")
    assert gc.isenabled()
