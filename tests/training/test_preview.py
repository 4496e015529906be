"""Sample pictures during training: when, which, and that training does not notice."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from library.core.errors import DataError
from library.flow.generate import ImageModel, generate
from library.options.request import ImageRequest
from library.options.sampling import SampleOptions
from library.training.events import Moment
from library.training.watch.grid import Grid
from library.training.watch.preview import Previews

DEFAULTS = ImageRequest(width=32, height=32, steps=3, seed=100, discrete_flow_shift=3.0)


class Net(nn.Module):
    """A small model with dropout, so that drawing in train mode would show."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(16, 16, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x_BCHW: Tensor, sigma_B: Tensor, conditions: Sequence[float]) -> Tensor:
        scale = torch.tensor(conditions).view(-1, 1, 1, 1)
        return self.drop(self.mix(x_BCHW)) * scale + sigma_B.view(-1, 1, 1, 1)


def encode(requests: Sequence[ImageRequest]) -> tuple[list[float], list[float]]:
    if any(request.prompt == "unknown" for request in requests):
        raise DataError("the prompt 'unknown' is not encoded.")
    return [float(len(r.prompt)) for r in requests], [float(len(r.negative_prompt)) for r in requests]


def previews(tmp_path: Path, text: str, net: nn.Module | None = None, **options: object) -> Previews[float]:
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    net = net or Net()
    return Previews(
        SampleOptions(sample_prompts=tmp_path / "prompts.txt", **({"sample_at_first": True} | options)),
        folder=tmp_path / "sample",
        name="last",
        defaults=DEFAULTS,
        model=ImageModel(
            net,
            lambda z: torch.tanh(z[:, :3]).repeat_interleave(8, 2).repeat_interleave(8, 3),
            torch.device("cpu"),
        ),
        encode=encode,
        modules=[net],
        grid=Grid(tmp_path / "grid.png", tmp_path / "sample"),
    )


def moment(step: int, epoch: int = 0, epoch_ended: bool = False) -> Moment:
    return Moment(step=step, epoch=epoch, epoch_ended=epoch_ended, run_ended=False)


def names(tmp_path: Path) -> list[str]:
    """File names with the time stamp left out."""
    parts = [p.stem.split("_") for p in sorted((tmp_path / "sample").iterdir())]
    assert all(len(part[3]) == 14 and part[3].isdigit() for part in parts)
    return ["_".join(part[:3] + part[4:]) for part in parts]


def test_names_tell_step_number_and_seed(tmp_path: Path) -> None:
    event = previews(tmp_path, "a\nb --d 5\n", sample_every_n_steps=10)
    event.run(moment(10))
    assert names(tmp_path) == ["last_000010_00_100", "last_000010_01_5"]


def test_names_tell_the_epoch(tmp_path: Path) -> None:
    previews(tmp_path, "a\n", sample_every_n_epochs=2).run(moment(14, epoch=2, epoch_ended=True))
    assert names(tmp_path) == ["last_e000002_00_100"]


def test_due_at_first_every_n_steps_and_every_n_epochs(tmp_path: Path) -> None:
    event = previews(tmp_path, "a", sample_every_n_steps=4, sample_every_n_epochs=2)
    assert event.due(moment(0))
    assert not event.due(moment(3)) and event.due(moment(4)) and event.due(moment(8))
    assert (
        not event.due(moment(7, 1, True)) and event.due(moment(14, 2, True)) and not event.due(moment(13, 2))
    )
    assert not previews(tmp_path, "a", sample_at_first=False, sample_every_n_steps=4).due(moment(0))


def test_a_preview_is_the_picture_that_generate_draws(tmp_path: Path) -> None:
    net = Net()
    request = replace(DEFAULTS, prompt="abc", negative_prompt="n", seed=9, cfg_trunc_ratio=1.0)
    previews(tmp_path, "abc --n n --d 9 --ctr 1", net).run(moment(0))
    (file,) = (tmp_path / "sample").iterdir()
    model = previews(tmp_path, "abc", net.eval()).model
    (expected,) = generate(model, [request], [3.0], [1.0], progress=False)
    with Image.open(file) as picture:
        assert np.array_equal(np.asarray(picture), expected.numpy())


def test_training_does_not_notice(tmp_path: Path) -> None:
    net = Net()
    net.mix.eval()  # a part with a mode of its own keeps it
    torch.manual_seed(1)
    before = torch.get_rng_state()
    previews(tmp_path, "a\nb", net).run(moment(0))
    assert torch.equal(before, torch.get_rng_state())
    assert net.training and net.drop.training and not net.mix.training
    net(torch.randn(1, 16, 2, 2), torch.ones(1), [1.0]).sum().backward()
    assert net.mix.weight.grad is not None


def test_prompts_are_read_again_every_time(tmp_path: Path) -> None:
    event = previews(tmp_path, "a\n", sample_every_n_steps=1)
    event.run(moment(1))
    (tmp_path / "prompts.txt").write_text("a --d 1\nb --d 2\n", encoding="utf-8")
    event.run(moment(2))
    assert names(tmp_path) == ["last_000001_00_100", "last_000002_00_1", "last_000002_01_2"]


def test_a_broken_prompt_file_costs_the_preview_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    event = previews(tmp_path, "a\n")
    (tmp_path / "prompts.txt").write_text("a --w 7\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        event.run(moment(0))
    assert not (tmp_path / "sample").exists()
    assert "image width 7" in caplog.text


def test_a_prompt_that_cannot_be_encoded_costs_that_picture_only(tmp_path: Path) -> None:
    previews(tmp_path, "a\nunknown\nb\n").run(moment(0))
    assert names(tmp_path) == ["last_000000_00_100", "last_000000_02_102"]


def test_a_batch_draws_the_pictures_of_one_by_one(tmp_path: Path) -> None:
    net, pictures = Net(), {}
    for size in (1, 3):
        folder = tmp_path / str(size)
        folder.mkdir()
        previews(folder, "a\nbb\nccc --w 64\ndddd\n", net, sample_batch_size=size).run(moment(0))
        files = sorted((folder / "sample").iterdir())
        pictures[size] = [np.asarray(Image.open(file)).astype(int) for file in files]
        assert len(files) == 4
    for one, together in zip(pictures[1], pictures[3], strict=True):
        assert np.abs(one - together).max() <= 1
