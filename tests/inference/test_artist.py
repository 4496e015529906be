"""From requests to files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from library.flow.generate import ImageModel, generate
from library.inference.artist import Artist
from library.options.request import ImageRequest

REQUEST = ImageRequest(prompt="fox", negative_prompt="fog", width=32, height=16, steps=2, seed=3)
MODEL: ImageModel[float] = ImageModel(
    lambda x, sigma, conditions: x * torch.tensor(conditions).view(-1, 1, 1, 1),
    lambda z: torch.tanh(z[:, :3]).repeat_interleave(8, 2).repeat_interleave(8, 3),
    torch.device("cpu"),
)


class Encoder:
    """Counts what it encodes."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> list[float]:
        self.seen.append(list(texts))
        return [float(len(text)) for text in texts]


def artist() -> tuple[Artist[float], Encoder]:
    encoder = Encoder()
    return Artist(MODEL, lambda r: (f"system: {r.prompt}", r.negative_prompt), encoder), encoder


def test_a_text_is_encoded_once_and_prompt_and_negative_of_one_wording_are_told_apart(tmp_path: Path) -> None:
    subject, encoder = artist()
    same = replace(REQUEST, negative_prompt="fox")
    subject.prepare([REQUEST, same])
    subject.draw(REQUEST, tmp_path, {})
    subject.draw(replace(REQUEST, prompt="hen"), tmp_path, {})
    assert encoder.seen == [["system: fox", "fog", "fox"], ["system: hen"]]


def test_the_file_is_the_picture_that_generate_draws(tmp_path: Path) -> None:
    path = artist()[0].draw(REQUEST, tmp_path, {"Model": "m"})
    (expected,) = generate(MODEL, [REQUEST], [11.0], [3.0], progress=False)
    with Image.open(path) as picture:
        assert np.array_equal(np.asarray(picture), expected.numpy())
        assert "Model: m" in picture.text["parameters"]
    assert path.name.startswith("image_") and path.name.endswith("_3.png")


def test_every_picture_has_a_file_of_its_own(tmp_path: Path) -> None:
    subject, _ = artist()
    paths = {subject.draw(REQUEST, tmp_path, {}) for _ in range(3)}
    assert len(paths) == 3 == len(list(tmp_path.iterdir()))


def test_without_a_seed_every_picture_is_another(tmp_path: Path) -> None:
    subject, _ = artist()
    stems = [subject.draw(replace(REQUEST, seed=None), tmp_path, {}).stem.split("_") for _ in range(2)]
    assert stems[0][2] != stems[1][2]
