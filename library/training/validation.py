"""The loss on held-out pictures: the same captions, sigmas and noise always, so that runs can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from library.core.dist import Processes
from library.core.errors import Stopped
from library.core.log import logger
from library.core.seeds import derive
from library.data.batch import Batch
from library.data.items import Item
from library.flow import path
from library.options.training import ValidationOptions
from library.training.events import Interval, Moment
from library.training.inputs import Inputs
from library.training.modes import eval_mode
from library.training.noising import add_noise
from library.training.objective import Objective
from library.training.state.stop import StopRequest

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)

_log = logger("validation")


@dataclass(frozen=True)
class Validation:
    """The event that measures the loss of `items` at each of SIGMAS and reports the means.

    batches: makes a batch of each of the items it is given. report: takes the step and the values, on every
    process. modules: put into eval mode meanwhile.

    Each process measures its share of the pictures, one by one: buckets then need no grouping, every picture
    counts the same, and the result does not depend on the number of processes. The noise of a picture is a
    function of its content and the sigma: it does not change with the run's seed or the other pictures.
    """

    shared: ClassVar[bool] = True
    options: ValidationOptions
    items: Sequence[Item]
    batches: Callable[[Sequence[Item]], Iterator[Batch]]
    inputs: Inputs
    objective: Objective
    report: Callable[[int, dict[str, float]], None]
    modules: Sequence[nn.Module]
    processes: Processes
    stop: StopRequest

    def due(self, moment: Moment) -> bool:
        """Whether a validation is due; never without held-out pictures."""
        if not self.items:
            return False
        if moment.step == 0:
            return self.options.validate_at_first
        steps, epochs = self.options.validate_every_n_steps, self.options.validate_every_n_epochs
        return Interval(steps, 1 if steps is None and epochs is None else epochs).hits(moment)

    def run(self, moment: Moment) -> None:
        """Measure and report.

        Raises:
            Stopped: a process was asked to stop; raised on all of them.
        """
        with eval_mode(self.modules), torch.no_grad():
            means = self._measure().double().mean(dim=0).tolist()
        mean = sum(means) / len(means)
        curve = {f"loss/validation_sigma_{s}": value for s, value in zip(SIGMAS, means, strict=True)}
        self.report(moment.step, {"loss/validation": mean} | curve)
        _log.info("step %d: validation loss %.4f", moment.step, mean)

    def _measure(self) -> Tensor:
        """Return the loss of every item (rows) at every sigma (columns), fp32 on the CPU.

        Each process runs the model equally often, if need be on a picture that does not count: where the
        model is sharded, its parts come together only if all of them run it.
        """
        rank, world, count = self.processes.rank, self.processes.world, len(self.items)
        firsts = range(0, count, world)
        mine = [self.items[min(first + rank, count - 1)] for first in firsts]
        losses_NS = torch.zeros(count, len(SIGMAS), device=self.processes.device)
        with closing(self.batches(mine)) as batches:
            for first, item, batch in zip(firsts, mine, batches, strict=True):
                if self.processes.any(self.stop.reason() is not None):
                    raise Stopped("validation is broken off")
                losses_S = self._losses(item, batch)
                if first + rank < count:
                    losses_NS[first + rank] = losses_S
        return self.processes.sum(losses_NS).cpu()

    def _losses(self, item: Item, batch: Batch) -> Tensor:
        """Return a picture's loss at every sigma."""
        (latents_Chw,), conditions = self.inputs.latents(batch), self.objective.conditions(batch)
        losses = []
        for sigma in SIGMAS:
            noisy = add_noise([latents_Chw], [_noise(latents_Chw, item, sigma)], torch.tensor([sigma]))
            losses.append(self.objective.losses_at(batch, noisy, conditions))
        return torch.cat(losses)


def measured(items: Sequence[Item], max_steps: int | None) -> list[Item]:
    """Return the pictures to measure: all, or as many as make `max_steps` batches of their datasets' sizes.

    Which they are is decided by their content, so they come from all buckets and datasets, and stay.
    """
    if max_steps is None:
        return list(items)
    chosen, steps = [], Fraction(0)
    for item in sorted(items, key=lambda item: derive(0, "validation order", item.digest)):
        steps += Fraction(1, item.dataset.batch_size)
        if steps > max_steps:
            break
        chosen.append(item)
    return chosen


def _noise(latents_Chw: Tensor, item: Item, sigma: float) -> Tensor:
    return path.draw_noise(latents_Chw.shape, derive(0, "validation", item.digest, sigma))
