"""Sample pictures during training, drawn by the sampler that the inference script uses.

A preview leaves no trace in training: its noise comes from generators of its own, dropout is off while it
runs, and one that fails costs a message. Prompts are read from their file every time, so they can be edited
during a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from torch import nn

from library.core.errors import UserError
from library.core.log import logger
from library.data.png import free_path, time_stamp, write_png
from library.data.prompts import load_sample_prompts
from library.flow.generate import ImageModel, batches, generate
from library.flow.guidance import Condition
from library.options.request import ImageRequest
from library.options.sampling import SampleOptions
from library.training.events import Interval, Moment

# For each request, what its prompt and what its negative prompt are to the model.
EncodeRequests = Callable[[Sequence[ImageRequest]], tuple[Sequence[Condition], Sequence[Condition]]]

_log = logger("preview")


@dataclass(frozen=True)
class Previews(Generic[Condition]):
    """The event that draws sample pictures: `folder/<name>_<epoch or step>_<number>_<time>_<seed>.png`.

    defaults: what prompts do not set; its seed numbers those without one. encode: turns requests into
    conditions; it may raise UserError for a prompt that cannot be encoded any more. modules: put into eval
    mode meanwhile.
    """

    options: SampleOptions
    folder: Path
    name: str
    defaults: ImageRequest
    model: ImageModel[Condition]
    encode: EncodeRequests[Condition]
    modules: Sequence[nn.Module]

    def due(self, moment: Moment) -> bool:
        """Whether the options ask for pictures at this moment."""
        if moment.step == 0:
            return self.options.sample_at_first
        return Interval(self.options.sample_every_n_steps, self.options.sample_every_n_epochs).hits(moment)

    def run(self, moment: Moment) -> None:
        """Draw every prompt. What fails is reported and left out; training goes on."""
        if self.options.sample_prompts is None:
            return
        try:
            requests = load_sample_prompts(self.options.sample_prompts, self.defaults)
        except UserError as error:
            _log.warning("no sample pictures this time: %s", error)
            return
        with evaluating(self.modules):
            for places in batches(requests, self.options.sample_batch_size):
                try:
                    self._draw(moment, places, [requests[place] for place in places])
                except UserError as error:
                    _log.warning("sample picture %s is left out: %s", ", ".join(map(str, places)), error)

    def _draw(self, moment: Moment, places: Sequence[int], requests: Sequence[ImageRequest]) -> None:
        conditions, negatives = self.encode(requests)
        pictures = generate(self.model, requests, conditions, negatives)
        facts = {"Step": str(moment.step), "Epoch": str(moment.epoch)}
        for place, request, picture in zip(places, requests, pictures, strict=True):
            stem = f"{self.name}_{self._when(moment)}_{place:02d}_{time_stamp()}_{request.seed}"
            write_png(free_path(self.folder, stem), picture.numpy(), request, facts)

    def _when(self, moment: Moment) -> str:
        every = self.options.sample_every_n_epochs
        by_epoch = every is not None and moment.epoch_ended and moment.epoch % every == 0
        return f"e{moment.epoch:06d}" if by_epoch else f"{moment.step:06d}"


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put modules and all their parts into eval mode; afterwards each part is in its own mode again."""
    parts = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in parts.items():
            part.training = training
