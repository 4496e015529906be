"""Sample pictures during training, drawn by the sampler that the inference script uses.

A preview leaves no trace in training: its noise comes from generators of its own, dropout is off while it
runs, and one that fails costs a message. Prompts are read from their file every time, so they can be edited
during a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic

import numpy as np
from torch import nn

from library.core.errors import UserError
from library.core.log import logger
from library.data.png import free_path, time_stamp, write_png
from library.data.prompt_files import load_sample_prompts
from library.flow.generate import ImageModel, batches, generate
from library.flow.guidance import ConditionT
from library.options.request import ImageRequest
from library.options.sampling import SampleOptions
from library.training.events import Interval, Moment
from library.training.modes import eval_mode
from library.training.watch.grid import Grid

# For each request, what its prompt and what its negative prompt are to the model.
EncodeRequests = Callable[[Sequence[ImageRequest]], tuple[Sequence[ConditionT], Sequence[ConditionT]]]

# Takes the step, a name, pixels_HWC (uint8, RGB) and the prompt, and shows the picture somewhere.
ShowPicture = Callable[[int, str, np.ndarray, str], None]

_log = logger("preview")


@dataclass(frozen=True)
class Look:
    """A network to draw with: what stands behind names ("" for the trained one), and how it is put in place.

    once: it does not change in training, so a prompt is drawn with it a single time.
    """

    label: str = ""
    in_place: Callable[[], AbstractContextManager[None]] = nullcontext
    once: bool = False

    def after(self, name: str) -> str:
        """Return `name` with the label behind it."""
        return f"{name}-{self.label}" if self.label else name


@dataclass(frozen=True)
class Previews(Generic[ConditionT]):
    """The event that draws sample pictures: `folder/<name>_<epoch or step>_<number>_<time>_<seed>.png`, with
    every network of `looks`, and a grid of all of them.

    defaults: what prompts do not set; its seed numbers those without one. encode: turns requests into
    conditions; it may raise UserError for a prompt that cannot be encoded any more. modules: put into eval
    mode meanwhile.
    """

    shared: ClassVar[bool] = False
    options: SampleOptions
    folder: Path
    name: str
    defaults: ImageRequest
    model: ImageModel[ConditionT]
    encode: EncodeRequests[ConditionT]
    modules: Sequence[nn.Module]
    grid: Grid
    looks: Sequence[Look] = (Look(),)
    show: ShowPicture | None = None

    def due(self, moment: Moment) -> bool:
        """Whether the options ask for pictures at this moment."""
        if moment.step == 0:
            return self.options.sample_at_first
        return Interval(self.options.sample_every_n_steps, self.options.sample_every_n_epochs).hits(moment)

    def run(self, moment: Moment) -> None:
        """Draw every prompt. What fails is reported and left out; training goes on."""
        if self.options.prompts is None:
            return
        try:
            requests = load_sample_prompts(self.options.prompts, self.defaults)
        except UserError as error:
            _log.warning("no sample pictures this time: %s", error)
            return
        with eval_mode(self.modules):
            for look in self.looks:
                with look.in_place():
                    self._draw_all(moment, look, requests)
        try:
            self.grid.write()
        except UserError as error:
            _log.warning("the grid of sample pictures is not written: %s", error)

    def _draw_all(self, moment: Moment, look: Look, requests: Sequence[ImageRequest]) -> None:
        for places in batches(requests, self.options.sample_batch_size):
            if look.once:
                places = [p for p in places if not self.grid.has(_row(p, requests[p]), look.label)]
            if not places:
                continue
            try:
                self._draw(moment, look, places, [requests[place] for place in places])
            except (UserError, OSError) as error:  # the latter from reading back for the grid
                _log.warning("sample picture %s is left out: %s", ", ".join(map(str, places)), error)

    def _draw(
        self, moment: Moment, look: Look, places: Sequence[int], requests: Sequence[ImageRequest]
    ) -> None:
        conditions, negatives = self.encode(requests)
        pictures = generate(self.model, requests, conditions, negatives)
        facts = {"Step": str(moment.step), "Epoch": str(moment.epoch)}
        when = self._when(moment)
        for place, request, picture in zip(places, requests, pictures, strict=True):
            stem = f"{look.after(self.name)}_{when}_{place:02d}_{time_stamp()}_{request.seed}"
            path = free_path(self.folder, stem)
            write_png(path, picture.numpy(), request, facts)
            column = look.label if look.once else look.after(when)
            self.grid.add(_row(place, request), column, path.name, request.prompt)
            if self.show is not None:
                self.show(moment.step, f"{look.after('sample')}/{place:02d}", picture.numpy(), request.prompt)

    def _when(self, moment: Moment) -> str:
        every = self.options.sample_every_n_epochs
        by_epoch = every is not None and moment.epoch_ended and moment.epoch % every == 0
        return f"e{moment.epoch:06d}" if by_epoch else f"{moment.step:06d}"


def _row(place: int, request: ImageRequest) -> str:
    """Name a row of the grid by all that decides its pictures, so that an edited prompt starts a new one."""
    return f"{place:02d} {request}"
