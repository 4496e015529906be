"""The loss on held-out pictures: the same captions, sigmas and noise always, so that runs can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.core.log import logger
from library.core.seeds import derive
from library.data.batch import Batch
from library.data.items import Draw, Item
from library.flow import path
from library.training.events import Interval, Moment
from library.training.inputs import Inputs
from library.training.objective import Objective, add_noise
from library.training.watch.preview import evaluating

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)

_log = logger("validation")


@dataclass(frozen=True)
class Validation:
    """The event that measures validation loss at each of SIGMAS and reports it.

    batch: makes a batch from draws. report: takes the step and the values. The noise of a picture is a
    function of its content and the sigma: it does not change with the run's seed or the other pictures.
    """

    interval: Interval
    items: Sequence[Item]
    max_batches: int | None
    batch: Callable[[Sequence[Draw]], Batch]
    inputs: Inputs
    objective: Objective
    report: Callable[[int, dict[str, float]], None]
    modules: Sequence[nn.Module]

    def due(self, moment: Moment) -> bool:
        """Whether a validation is due; never without held-out pictures."""
        return bool(self.items) and self.interval.hits(moment)

    def run(self, moment: Moment) -> None:
        """Measure and report."""
        with evaluating(self.modules), torch.no_grad():
            values = self._measure()
        self.report(moment.step, values)
        _log.info("step %d: validation loss %.4f", moment.step, values["loss/validation"])

    def _measure(self) -> dict[str, float]:
        """Pictures go one by one: buckets then need no grouping, and every picture counts the same."""
        losses: dict[float, list[Tensor]] = {sigma: [] for sigma in SIGMAS}
        for number, item in enumerate(self.items[: self.max_batches]):
            batch = self.batch([Draw(item.index, repeat=0, epoch=0, step=0, micro=0, slot=number)])
            latents_1CHW, conditions = self.inputs.latents(batch), self.objective.conditions(batch)
            for sigma in SIGMAS:
                noisy = add_noise(latents_1CHW, _noise(latents_1CHW, item, sigma), torch.tensor([sigma]))
                losses[sigma].append(self.objective.losses_at(batch, noisy, conditions))
        means = {sigma: torch.cat(values).mean().item() for sigma, values in losses.items()}
        values = {f"loss/validation_sigma_{sigma}": mean for sigma, mean in means.items()}
        return {"loss/validation": sum(means.values()) / len(means)} | values


def _noise(latents_1CHW: Tensor, item: Item, sigma: float) -> Tensor:
    return path.draw_noise(latents_1CHW.shape, derive(0, "validation", item.digest, sigma))
