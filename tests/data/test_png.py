"""PNG files that say how they were made."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.core.errors import StorageError
from library.data.png import free_path, parameters_text, write_png
from library.options.request import ImageRequest

REQUEST = ImageRequest(prompt="a red fox, sitting", negative_prompt="blurry", width=48, height=32, seed=7)
FACTS = {"Model": "lumina, 2: final", "System prompt": 'You "draw".'}
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)


def read_as_other_tools_do(text: str) -> tuple[str, str, dict[str, str]]:
    """Take the web UI's text apart: prompt, negative prompt, and the pairs of the last line."""
    *lines, last = text.split("\n")
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt: ")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    return prompt, negative, {k: json.loads(v) if v.startswith('"') else v for k, v in pairs}


def test_parameters_are_read_back_by_the_common_rules() -> None:
    prompt, negative, pairs = read_as_other_tools_do(parameters_text(REQUEST, FACTS))
    assert (prompt, negative) == ("a red fox, sitting", "blurry")
    assert pairs["Model"] == "lumina, 2: final"
    assert pairs["System prompt"] == 'You "draw".'
    assert (pairs["Seed"], pairs["Size"], pairs["Steps"], pairs["CFG scale"]) == ("7", "48x32", "36", "3.5")


def test_pixels_and_both_chunks_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.png"
    write_png(path, PIXELS, REQUEST, FACTS)
    with Image.open(path) as picture:
        assert np.array_equal(np.asarray(picture), PIXELS)
        assert picture.text["parameters"] == parameters_text(REQUEST, FACTS)
        facts = json.loads(picture.text["flow-scripts"])
    assert facts["seed"] == 7 and facts["negative_prompt"] == "blurry" and facts["Model"] == FACTS["Model"]
    assert b"tEXtparameters\0" in path.read_bytes()


def test_text_beyond_latin_1_survives(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", PIXELS, ImageRequest(prompt="赤い狐 🦊", width=48, height=32, seed=7), {})
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text["parameters"].startswith("赤い狐 🦊\n")
        assert json.loads(picture.text["flow-scripts"])["prompt"] == "赤い狐 🦊"


def test_names_are_never_used_twice(tmp_path: Path) -> None:
    for expected in ("s.png", "s_2.png", "s_3.png"):
        path = free_path(tmp_path, "s")
        assert path.name == expected
        write_png(path, PIXELS, REQUEST, {})


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write_png(tmp_path / "file" / "a.png", PIXELS, REQUEST, {})
    with pytest.raises(TypeError):
        write_png(tmp_path / "a.png", PIXELS.astype(np.float64), REQUEST, {})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
