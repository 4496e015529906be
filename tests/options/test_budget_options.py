"""--vram_budget: amounts as people write them."""

import pytest

from library.core.errors import ConfigError
from library.options.budget import BudgetOptions


@pytest.mark.parametrize(
    ("words", "size"),
    [("12GB", 12 * 2**30), ("12", 12 * 2**30), ("7.5 GiB", 7.5 * 2**30), ("800mb", 800 * 2**20)],
)
def test_amounts(words, size):
    assert BudgetOptions(vram_budget=words).bytes_allowed == size


@pytest.mark.parametrize("words", ["", "much", "0GB", "-3GB", "12TB", "1.2.3GB"])
def test_what_is_no_amount_is_refused(words):
    with pytest.raises(ConfigError, match="12GB"):
        BudgetOptions(vram_budget=words)


def test_auto_is_taken():
    assert BudgetOptions(vram_budget="auto").vram_budget == "auto"
