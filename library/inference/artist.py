"""From requests to files, for any family: what an inference script does once its models are named."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar

from library.data.png import free_path, time_stamp, write_png
from library.flow.generate import ImageModel, generate
from library.flow.guidance import ConditionT
from library.options.request import ImageRequest

PromptT = TypeVar("PromptT")  # what is encoded, hashable: a text, perhaps with the picture it speaks of


class Artist(Generic[PromptT, ConditionT]):
    """Draws one request at a time; a prompt is encoded once, however often it is drawn."""

    def __init__(
        self,
        model: ImageModel[ConditionT],
        prompts: Callable[[ImageRequest], tuple[PromptT, PromptT]],
        encode: Callable[[Sequence[PromptT]], Sequence[ConditionT]],
    ) -> None:
        """`prompts` returns a request's prompt and negative prompt as the encoder takes them."""
        self._model = model
        self._prompts = prompts
        self._encode = encode
        self._conditions: dict[PromptT, ConditionT] = {}

    def prepare(self, requests: Iterable[ImageRequest]) -> None:
        """Encode the prompts of many requests at once, so that the text encoder is needed only once."""
        prompts = dict.fromkeys(prompt for request in requests for prompt in self._prompts(request))
        new = [prompt for prompt in prompts if prompt not in self._conditions]
        if new:
            self._conditions |= dict(zip(new, self._encode(new), strict=True))

    def forget(self) -> None:
        """Forget encoded prompts, because the text encoder has changed."""
        self._conditions.clear()

    def draw(self, request: ImageRequest, folder: Path, facts: Mapping[str, str]) -> Path:
        """Draw a request into `folder/image_<time>_<seed>.png`, with `facts` beside it; return the path."""
        request = request if request.seed is not None else replace(request, seed=secrets.randbits(32))
        self.prepare([request])
        condition, negative = (self._conditions[prompt] for prompt in self._prompts(request))
        (picture,) = generate(self._model, [request], [condition], [negative])
        path = free_path(folder, f"image_{time_stamp()}_{request.seed}")
        write_png(path, picture.numpy(), request, facts)
        return path
