"""Scheduled sampling in training: the model walks to where it is trained; see `library.flow.rollout`.

A walk is the sigmas that the model passes, from the noisiest down to the one that the picture is trained at;
() for a picture that is trained on the path. Walks are drawn ahead, with sigma, by `Noising`.

The model walks as it draws pictures: without gradients, and with nothing left out at random. Pictures that
have as many steps to go walk together, so a batch takes as many passes as its longest walk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from library.core.device import sent
from library.data.batch import Condition
from library.data.items import Manifest
from library.data.plan import Plan
from library.flow.rollout import Bias, probability
from library.options.rollout import RolloutOptions
from library.training.noising import Noising, NoisyLatents

Walk = tuple[float, ...]
Velocities = Callable[[Sequence[Tensor], Tensor, Sequence[Condition]], list[Tensor]]


@dataclass(frozen=True)
class RolledOut:
    """Latents after their walks; `biases` has None for each picture whose loss is the plain one."""

    noisy: NoisyLatents
    biases: Sequence[Bias | None]


@torch.no_grad()
def roll_out(
    noisy: NoisyLatents,
    walks: Sequence[Walk],
    conditions: Sequence[Condition],
    velocities: Velocities,
    *,
    reflexive: bool,
) -> RolledOut:
    """Let the model walk, and return where it arrives.

    Args:
        reflexive: ask it too, in the last pass, for the velocities on the path, and return biases.
    """
    places = [place for place, walk in enumerate(walks) if walk]
    x = {place: _start(noisy, place, walks[place]) for place in places}
    clean: list[Tensor] = []
    for left in range(passes_of(walks), 0, -1):
        walking = [place for place in places if len(walks[place]) > left]
        asked = [(place, x[place], walks[place][-1 - left]) for place in walking]
        if reflexive and left == 1:
            asked += [(place, noisy.x[place], walks[place][-1]) for place in places]
        at, there, sigmas = zip(*asked, strict=True)
        sigma_B = sent(torch.tensor(sigmas), noisy.sigma_B.device)
        found = velocities(there, sigma_B, [conditions[place] for place in at])
        for place, velocity in zip(walking, found, strict=False):
            x[place] = x[place] + (walks[place][-left] - walks[place][-1 - left]) * velocity
        clean = found[len(walking) :]
    rolled = replace(noisy, x=[x.get(place, on_path) for place, on_path in enumerate(noisy.x)])
    biases: list[Bias | None] = [None] * len(walks)
    for place, velocity in zip(places if reflexive else (), clean, strict=True):
        drift = x[place] - noisy.x[place]
        biases[place] = Bias(velocity, drift + walks[place][-1] * noisy.target[place])
    return RolledOut(rolled, biases)


def passes_of(walks: Sequence[Walk]) -> int:
    """Return how many times the model runs for these walks."""
    return max((len(walk) - 1 for walk in walks if walk), default=0)


def _start(noisy: NoisyLatents, place: int, walk: Walk) -> Tensor:
    """Return a picture's latents where its walk begins: along the path, whose slope is the target."""
    return noisy.x[place] + (walk[0] - walk[-1]) * noisy.target[place]


@dataclass(frozen=True)
class Passes:
    """How many passes the walks of a micro-batch take on the process where they take most.

    Every process can tell, because all draws are functions of the plan; so they keep step without a word.
    """

    plan: Plan
    manifest: Manifest
    noising: Noising

    def __call__(self, step: int, micro: int) -> int:
        """Return the number of passes for a micro-batch of a training step, both counted from 0."""
        draws = self.plan.step(step)[micro].draws
        items = [self.manifest.items[draw.item] for draw in draws]
        sizes = [item.geometry.bucket for item in items]
        preserved = [item.preserved for item in items]
        return passes_of(self.noising.walks_of_others(draws, sizes, preserved))


class RolloutGauge:
    """How many pictures of a step were rolled out over all processes, and how many steps they took."""

    shared = True

    def __init__(self, options: RolloutOptions, device: torch.device) -> None:
        self._options, self._device = options, device
        self._offsets: list[int] = []
        self._probability = 0.0

    def add(self, walks: Sequence[Walk]) -> None:
        """Take note of a micro-batch."""
        self._offsets += [len(walk) - 1 for walk in walks if walk]

    def measure(self, step: int) -> Tensor:
        """Return the number of pictures and the sum of their steps; forget them."""
        numbers = torch.tensor([len(self._offsets), sum(self._offsets)], dtype=torch.float32)
        self._offsets.clear()
        self._probability = probability(self._options, step)
        return sent(numbers, self._device)

    def named(self, numbers: Sequence[float]) -> dict[str, float]:
        """Return the number, the mean offset of those pictures, and the probability that was drawn with."""
        pictures, steps = numbers
        mean = {"rollout/mean_offset": steps / pictures} if pictures else {}
        return {"rollout/probability": self._probability, "rollout/pictures": pictures, **mean}
