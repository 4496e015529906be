"""Contact sheets: what the model will be shown, as pictures with their masks and captions. Torch-free."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from library.core.files import atomic_write
from library.data.captions import draw_caption
from library.data.images import drawn_source, is_flipped, load_pixels, load_source
from library.data.items import Draw, DrawKey, Item, Manifest
from library.data.plan import Plan

TILE = 256  # pixels along one side of a picture's square
PER_SHEET = 24
_COLUMNS, _CAPTION_LINES, _LINE, _MARGIN = 6, 6, 14, 8
_CHARACTERS = 44  # of a caption line
_MASKED = np.array([255, 0, 64], np.float32)  # what the loss does not see is tinted with it


@dataclass(frozen=True)
class Shown:
    """What decides how a draw looks. total_steps: of the run. max_variants: as for `draw_caption`.

    source_dropout: share of the draws of an edited picture that go without its source.
    """

    seed: int
    total_steps: int
    max_variants: int | None
    source_dropout: float = 0.0


def first_draws(plan: Plan) -> Iterator[Draw]:
    """Yield the first draw of each picture in the first epoch, in the order of training."""
    seen: set[int] = set()
    for step in range(plan.steps_per_epoch):
        for draw in (draw for micro in plan.step(step) for draw in micro.draws):
            if draw.item not in seen:
                seen.add(draw.item)
                yield draw


def write_sheet(path: Path, manifest: Manifest, draws: Sequence[Draw], shown: Shown) -> None:
    """Write one sheet of at most PER_SHEET draws: each cropped, flipped and captioned as in training.

    Where a picture is an edit, its source stands at the left of it.

    Raises:
        DataError: a picture cannot be read any more.
        StorageError: the sheet cannot be written.
    """
    draws = list(islice(draws, PER_SHEET))
    columns = min(_COLUMNS, len(draws))
    width, height = TILE + 2 * _MARGIN, TILE + 2 * _MARGIN + _CAPTION_LINES * _LINE
    sheet = Image.new("RGB", (columns * width, -(-len(draws) // columns) * height), "white")
    for number, draw in enumerate(draws):
        row, column = divmod(number, columns)
        _draw_tile(sheet, (column * width + _MARGIN, row * height + _MARGIN), manifest, draw, shown)
    with atomic_write(path) as handle:
        sheet.save(handle, format="PNG")


def write_sheets(folder: Path, manifest: Manifest, plan: Plan, shown: Shown) -> list[Path]:
    """Write sheets of all pictures of the first epoch: 0001.png, 0002.png ..."""
    draws, paths = first_draws(plan), []
    while part := list(islice(draws, PER_SHEET)):
        paths.append(folder / f"{len(paths) + 1:04d}.png")
        write_sheet(paths[-1], manifest, part, shown)
    return paths


def _draw_tile(
    sheet: Image.Image, place: tuple[int, int], manifest: Manifest, draw: Draw, shown: Shown
) -> None:
    item, key = manifest.items[draw.item], draw.key(shown.seed)
    _paste_pictures(sheet, place, item, key, shown)
    caption = draw_caption(
        item,
        seed=shown.seed,
        epoch=draw.epoch,
        repeat=draw.repeat,
        step=draw.step,
        total_steps=shown.total_steps,
        max_variants=shown.max_variants,
    )
    width, height = item.geometry.bucket
    lines = [f"{item.path.name}  {width}x{height}", *textwrap.wrap(caption or "(no caption)", _CHARACTERS)]
    if len(lines) > _CAPTION_LINES:
        lines = [*lines[: _CAPTION_LINES - 1], "..."]
    text = "\n".join(lines)
    font = ImageFont.load_default(size=11)
    ImageDraw.Draw(sheet).multiline_text((place[0], place[1] + TILE + 2), text, "black", font, spacing=2)


def _paste_pictures(
    sheet: Image.Image, place: tuple[int, int], item: Item, key: DrawKey, shown: Shown
) -> None:
    """Paste a picture as it is drawn, and its source beside it if it is drawn with one."""
    flip = is_flipped(item, key)
    pixels, mask_HW = load_pixels(item, key, flip=flip)
    if mask_HW is not None:
        kept_HW1 = 0.25 + 0.75 * mask_HW[..., None]
        pixels = (pixels * kept_HW1 + _MASKED * (1 - kept_HW1)).astype(np.uint8)
    source = drawn_source(item, key, flip=flip, dropout=shown.source_dropout)
    pictures = [pixels] if source is None else [load_source(source), pixels]
    for number, each in enumerate(pictures):
        picture = Image.fromarray(each)
        picture.thumbnail((TILE // len(pictures), TILE))
        sheet.paste(picture, (place[0] + number * TILE // len(pictures), place[1]))
