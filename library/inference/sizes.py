"""How large a picture is drawn when nobody says it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from library.data.items import Size
from library.options.request import SIZE_STEP, ImageRequest


def sized(request: ImageRequest, usual: Sequence[Size], source: Size | None) -> ImageRequest:
    """Return the request with the sides that it leaves open.

    With neither, it is the usual size with the nearest proportions to the source, or the first without one.
    With one of them, the other follows the source's proportions, or is that of the first usual size.

    Args:
        usual: the sizes that the model draws best. source: of the picture that is edited, if there is one.
    """
    width, height = request.width, request.height
    if width is None and height is None:
        width, height = usual[0] if source is None else _nearest(source, usual)
    elif width is None:
        width = usual[0][0] if source is None else _rounded(height * source[0] / source[1])
    elif height is None:
        height = usual[0][1] if source is None else _rounded(width * source[1] / source[0])
    return replace(request, width=width, height=height)


def _nearest(source: Size, sizes: Sequence[Size]) -> Size:
    """Proportions are compared as factors, so that portrait counts like landscape."""
    return min(sizes, key=lambda size: abs(math.log(size[0] * source[1] / (size[1] * source[0]))))


def _rounded(side: float) -> int:
    return max(SIZE_STEP, round(side / SIZE_STEP) * SIZE_STEP)
