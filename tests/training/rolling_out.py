"""What scheduled sampling should compute, once more: picture by picture and step by step, in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from library.core import seeds
from library.data.batch import Batch
from library.flow.noise import perturbation
from library.flow.path import draw_noise
from library.training.assembly import Assembly
from library.training.context import RunContext


def slow_losses(context: RunContext, parts: Assembly, batch: Batch) -> Iterator[Tensor]:
    """Yield the loss of each picture of a batch, before its weight, with l2 as the loss.

    It reads the options max_step_offset (uniform), probability, step_size, and those of ReflexFlow.
    """
    options = vars(context.options.rollout)
    options = {name.removeprefix("scheduled_sampling_"): value for name, value in options.items()}
    conditions = parts.objective.conditions(batch)
    for place, draw in enumerate(batch.draws):
        x0, sigma = parts.objective._inputs.latents(batch)[place], batch.sigmas[place]
        key = (context.seed, draw.step, draw.micro, draw.slot)
        noise = draw_noise(x0.shape, *key)
        extra = torch.zeros_like(x0)
        if context.options.noise.ip_noise_gamma:
            extra = perturbation(context.options.noise, x0.shape, *key)

        def velocity(x: Tensor, sigma: float, condition=conditions[place]) -> Tensor:
            (found,) = context.trainer.velocities(parts.model, [x], torch.tensor([sigma]), [condition])
            return found

        on_path = (1 - sigma) * x0 + sigma * (noise + extra)
        source = _source(options, batch.preserved[place], sigma, *key)
        x, steps = on_path, math.ceil((source - sigma) / options["step_size"] - 1e-6)
        if steps:
            x = (1 - source) * x0 + source * noise + sigma * extra
            with torch.no_grad():
                for step in range(steps):
                    here = source - step * (source - sigma) / steps
                    x = x - (source - sigma) / steps * velocity(x, here)
        mask = torch.ones(x0.shape[1:]) if batch.masks is None else batch.masks[place]
        predicted = velocity(x, sigma)
        squares = (predicted - (noise - x0)) ** 2
        if not steps or not options["reflexflow"]:
            yield (squares * mask).mean()
            continue
        with torch.no_grad():
            bias = (velocity(on_path, sigma) - predicted).abs()
        weights = 1 + options["reflexflow_alpha"] * bias / bias.mean()
        ours, wanted = predicted * mask, (x - x0 - sigma * extra) * mask
        drift = ours / ours.norm() - wanted / wanted.norm()
        plain = (squares * weights * mask).mean()
        yield options["reflexflow_beta2"] * plain + options["reflexflow_beta1"] * (drift**2).sum()


def _source(options: dict[str, object], preserved: bool, sigma: float, seed: int, *key: int) -> float:
    """Return the sigma at which the walk to a picture begins."""
    if preserved or seeds.unit(seed, "rollout", *key) >= options["probability"]:
        return sigma
    most = options["max_step_offset"]
    offset = min(int(seeds.unit(seed, "rollout offset", *key) * (most + 1)), most)
    return min(sigma + offset * options["step_size"], 1.0)
