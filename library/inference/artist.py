"""From requests to files, for any family: what an inference script does once its models are named."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Generic

from library.data.png import free_path, time_stamp, write_png
from library.flow.generate import ImageModel, generate
from library.flow.guidance import Condition
from library.options.request import ImageRequest


class Artist(Generic[Condition]):
    """Draws one request at a time; a text is encoded once, however often it is drawn."""

    def __init__(
        self,
        model: ImageModel[Condition],
        texts: Callable[[ImageRequest], tuple[str, str]],
        encode: Callable[[Sequence[str]], Sequence[Condition]],
    ) -> None:
        """`texts` returns the texts of a request's prompt and negative prompt as the encoder takes them."""
        self._model = model
        self._texts = texts
        self._encode = encode
        self._conditions: dict[str, Condition] = {}

    def prepare(self, requests: Iterable[ImageRequest]) -> None:
        """Encode the texts of many requests at once, so that the text encoder is needed only once."""
        texts = dict.fromkeys(text for request in requests for text in self._texts(request))
        new = [text for text in texts if text not in self._conditions]
        if new:
            self._conditions |= dict(zip(new, self._encode(new), strict=True))

    def forget(self) -> None:
        """Forget encoded texts, because the text encoder has changed."""
        self._conditions.clear()

    def draw(self, request: ImageRequest, folder: Path, facts: Mapping[str, str]) -> Path:
        """Draw a request into `folder/image_<time>_<seed>.png`, with `facts` beside it; return the path."""
        request = request if request.seed is not None else replace(request, seed=secrets.randbits(32))
        self.prepare([request])
        condition, negative = (self._conditions[text] for text in self._texts(request))
        (picture,) = generate(self._model, [request], [condition], [negative])
        path = free_path(folder, f"image_{time_stamp()}_{request.seed}")
        write_png(path, picture.numpy(), request, facts)
        return path
