"""How many patches Qwen2.5-VL sees of a source picture. Neither torch nor numpy.

The official code cuts the source to the size of the target, halves that, and hands it to Qwen's processor,
which resizes to multiples of 28 pixels.
"""

from __future__ import annotations

import math

from library.data.items import Size

PATCH, MERGE, FRAMES = 14, 2, 2
_STEP = PATCH * MERGE
# The least is that of the released preprocessor_config.json. The most there is 12,845,056, but the
# transformer has 1024 positions for picture and caption together. This much leaves 256 for a caption; it is
# reached by targets of more than 2.4 megapixels, while the official sizes take 336 tokens at most.
MOST_PICTURE_TOKENS = 765
_MIN_PIXELS, _MAX_PIXELS = 56 * 56, MOST_PICTURE_TOKENS * _STEP**2
_MAX_RATIO = 200  # beyond, Qwen's processor refuses

Grid = tuple[int, int, int]


def picture_grid(size: Size) -> Grid:
    """Return how many patches (1, height, width) Qwen sees of a picture of the target's size."""
    width, height = _resized(half_size(size))
    return 1, height // PATCH, width // PATCH


def token_count(grid: Grid) -> int:
    """Return how many tokens a picture has: four patches make one."""
    return math.prod(grid) // MERGE**2


def half_size(size: Size) -> Size:
    """Return the size of the halved picture."""
    return max(1, size[0] // 2), max(1, size[1] // 2)


def _resized(size: Size) -> Size:
    """Return the size that Qwen's processor makes of one: multiples of 28, the area within its limits.

    Of a picture more than 200 times as long as wide, which the processor refuses, the short side is taken for
    longer: so it is stretched, and never lost.
    """
    width, height = (max(side, math.ceil(max(size) / _MAX_RATIO)) for side in size)
    area, rounded = width * height, [round(side / _STEP) * _STEP for side in (width, height)]
    if math.prod(rounded) > _MAX_PIXELS:
        shrink = math.sqrt(area / _MAX_PIXELS)
        rounded = [max(_STEP, math.floor(side / shrink / _STEP) * _STEP) for side in (width, height)]
    elif math.prod(rounded) < _MIN_PIXELS:
        grow = math.sqrt(_MIN_PIXELS / area)
        rounded = [math.ceil(side * grow / _STEP) * _STEP for side in (width, height)]
    return rounded[0], rounded[1]
