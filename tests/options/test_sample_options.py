"""Options of sample pictures during training."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.core.errors import ConfigError
from library.options.sampling import SampleOptions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_at_first": True}, "--sample_prompts"),
        ({"sample_every_n_steps": 5}, "--sample_prompts"),
        ({"sample_prompts": Path("p.txt"), "sample_compare_base": True}, "--sample_every_n_epochs"),
        ({"sample_prompts": Path("p.txt"), "sample_every_n_steps": 0}, "1 or more"),
        ({"sample_prompts": Path("p.txt"), "sample_at_first": True, "sample_batch_size": 0}, "1 or more"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SampleOptions(**settings)
