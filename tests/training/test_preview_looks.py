"""Sample pictures of several networks side by side, the grid of all of them, and where they are shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from library.core.errors import ConfigError
from library.flow.generate import ImageModel
from library.options.request import ImageRequest
from library.options.sampling import SampleOptions
from library.training.events import Moment
from library.training.watch.grid import CELL, LINE, MARGIN, Grid
from library.training.watch.preview import Look, Previews

REQUEST = ImageRequest(width=32, height=32, steps=2, seed=100, discrete_flow_shift=3.0)


class Level(nn.Module):
    """A model whose pictures are of one brightness, which is its only weight."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(0.2))

    def forward(self, x_BCHW: Tensor, sigma_B: Tensor, conditions: Sequence[None]) -> Tensor:
        return (x_BCHW - self.level) / sigma_B.view(-1, 1, 1, 1)  # leads to `level` in a straight line

    @contextmanager
    def at(self, level: float) -> Iterator[None]:
        with torch.no_grad():
            before = self.level.clone()
            self.level.fill_(level)
            yield
            self.level.copy_(before)


class Studio:
    """Previews of a Level with its base (black) and its average (white)."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.net = folder, Level()
        (folder / "prompts.txt").write_text(text, encoding="utf-8")
        self.grid = Grid(folder / "grid.png", folder / "sample")
        self.shown: list[tuple[int, str, int, str]] = []

    def draw(self, step: int) -> None:
        Previews(
            SampleOptions(sample_prompts=self.folder / "prompts.txt", sample_every_n_steps=1),
            folder=self.folder / "sample",
            name="last",
            defaults=REQUEST,
            model=ImageModel(self.net, decode, torch.device("cpu")),
            encode=lambda requests: ([None] * len(requests), [None] * len(requests)),
            modules=[self.net],
            grid=self.grid,
            looks=[
                Look("base", lambda: self.net.at(-1.0), once=True),
                Look(),
                Look("ema", lambda: self.net.at(1.0)),
            ],
            show=lambda step, name, pixels, prompt: self.shown.append((step, name, pixels[0, 0, 0], prompt)),
        ).run(Moment(step=step, epoch=1, epoch_ended=False, run_ended=False))

    def names(self) -> list[str]:
        return sorted("_".join(p.stem.split("_")[:3]) for p in (self.folder / "sample").iterdir())


def decode(latents_BCHW: Tensor) -> Tensor:
    return latents_BCHW[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)


def brightness(path: Path) -> int:
    return int(np.asarray(Image.open(path))[0, 0, 0])


def test_every_network_draws_and_the_base_only_once(tmp_path: Path) -> None:
    studio = Studio(tmp_path, "a\n")
    studio.draw(1)
    studio.draw(2)
    assert studio.names() == [
        "last-base_000001_00",
        "last-ema_000001_00",
        "last-ema_000002_00",
        "last_000001_00",
        "last_000002_00",
    ]
    found = {p.name.split("_")[0]: brightness(p) for p in (tmp_path / "sample").iterdir()}
    assert found == {"last-base": 0, "last-ema": 255, "last": 153}
    assert studio.net.level.item() == pytest.approx(0.2)


def test_an_edited_prompt_gets_a_base_picture_of_its_own(tmp_path: Path) -> None:
    studio = Studio(tmp_path, "a\nb\n")
    studio.draw(1)
    (tmp_path / "prompts.txt").write_text("a\nc\n", encoding="utf-8")
    studio.draw(2)
    assert [name for name in studio.names() if "base" in name] == [
        "last-base_000001_00",
        "last-base_000001_01",
        "last-base_000002_01",
    ]


def test_pictures_are_shown_with_step_name_and_prompt(tmp_path: Path) -> None:
    studio = Studio(tmp_path, "a cat\n")
    studio.draw(3)
    assert studio.shown == [
        (3, "sample-base/00", 0, "a cat"),
        (3, "sample/00", 153, "a cat"),
        (3, "sample-ema/00", 255, "a cat"),
    ]


def corners(path: Path) -> list[list[int]]:
    """The brightness of each cell's middle, row by row."""
    pixels = np.asarray(Image.open(path))
    height, width = CELL + MARGIN + LINE, CELL + MARGIN
    rows, columns = (pixels.shape[0] - LINE) // height, (pixels.shape[1] - MARGIN) // width
    return [
        [
            int(pixels[LINE + y * height + LINE + CELL // 2, MARGIN + x * width + CELL // 2, 0])
            for x in range(columns)
        ]
        for y in range(rows)
    ]


def test_the_grid_has_a_row_a_prompt_and_a_column_a_moment(tmp_path: Path) -> None:
    studio = Studio(tmp_path, "a\nb\n")
    studio.draw(1)
    assert corners(tmp_path / "grid.png") == [[0, 153, 255]] * 2
    nn.init.constant_(studio.net.level, 0.6)
    studio.draw(2)
    assert corners(tmp_path / "grid.png") == [[0, 153, 255, 204, 255]] * 2


def test_a_resumed_run_goes_on_with_the_grid(tmp_path: Path) -> None:
    studio = Studio(tmp_path, "a\nb\n")
    studio.draw(1)
    state = json.dumps(studio.grid.export_state())
    (lost,) = (tmp_path / "sample").glob("last_000001_01_*")
    lost.unlink()
    resumed = Studio(tmp_path, "a\nb\n")
    resumed.grid.import_state(json.loads(state))
    resumed.draw(2)
    assert not list((tmp_path / "sample").glob("last-base_000002*"))
    white = 255
    assert corners(tmp_path / "grid.png") == [[0, 153, 255, 153, 255], [0, white, 255, 153, 255]]


def test_a_long_grid_shrinks_its_cells(tmp_path: Path) -> None:
    (tmp_path / "sample").mkdir()
    Image.new("RGB", (512, 256), "red").save(tmp_path / "sample" / "a.png")
    grid = Grid(tmp_path / "grid.png", tmp_path / "sample")
    for number in range(200):
        grid.add("row", str(number), "a.png", "a")
    grid.write()
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width <= 16384 + MARGIN
        assert picture.getpixel((picture.width - 40, 2 * LINE + 5)) == (255, 0, 0)


def test_comparing_needs_prompts() -> None:
    with pytest.raises(ConfigError, match="--sample_compare_base has no pictures to compare with"):
        SampleOptions(sample_compare_base=True)
