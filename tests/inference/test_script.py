"""The template of the inference scripts."""

from __future__ import annotations

import pytest

from kandinsky5_minimal_inference import Kandinsky5Inference
from library.inference.script import InferenceScript
from lumina_minimal_inference import LuminaInference


@pytest.mark.parametrize("family", [LuminaInference, Kandinsky5Inference])
def test_a_family_overrides_hooks_only(family: type[InferenceScript]) -> None:
    final = {name for name, value in vars(InferenceScript).items() if getattr(value, "__final__", False)}
    own = {name for name in vars(family) if not name.startswith("_")}
    assert final == {"run"} and not own & final
    assert own <= set(vars(InferenceScript))
    assert not getattr(family, "__abstractmethods__", None)
