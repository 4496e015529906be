"""What token routing (--tread_routes) saves of a training step: foretold from its products, and measured.

    python benchmarks/routing.py                          # Kandinsky, bf16, one CPU thread, half over 2:-2
    python benchmarks/routing.py --family lumina --routes 2:-2:0.25
    python benchmarks/routing.py --device cuda --size full --checkpointing

The same model and LoRA as in step.py. Steps with routes, without, and without again (the control) take turns
in one process; medians; the first step of each is not counted. Drawing the tokens is part of the step here,
while in training the threads that load do it. Foretold is `library.training.routing.saved_share`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks.step import FAMILIES  # noqa: E402
from benchmarks.step_parts import (  # noqa: E402
    Clock,
    Contestant,
    Settings,
    add_model_arguments,
    make_step,
    settings_of,
)
from library.nn.running.routing import Routing, choose_kept  # noqa: E402
from library.options.tread import Route, resolved  # noqa: E402
from library.training.routing import saved_share  # noqa: E402


class Routed:
    """Ours, with routes."""

    def __init__(self, ours: Contestant, routes: tuple[Route, ...], counts: list[int]) -> None:
        self.ours, self.trained = ours, ours.trained
        self._routes, self._counts = routes, counts
        self._draws = torch.Generator().manual_seed(0)

    def loss(self, work: object) -> torch.Tensor:
        """Forward, with tokens drawn for it."""
        kept = tuple(
            tuple(choose_kept(count, route.share, self._draws) for count in self._counts)
            for route in self._routes
        )
        routing = Routing(self._routes, kept).to(self.trained[0].device)
        handle = self.ours.model.register_forward_pre_hook(
            lambda _, given, named: (given, named | {"routing": routing}), with_kwargs=True
        )
        try:
            return self.ours.loss(work)
        finally:
            handle.remove()


def measure(settings: Settings, written: list[str], rounds: int) -> None:
    """Print what was foretold and what was found."""
    ours, work = settings.family.contestants["ours"](settings), settings.family.work(settings)
    clock, model = Clock(settings.device), ours.model
    routes = resolved(map(Route.parse, written), len(model.routed_blocks))
    image = (settings.family.sizes[settings.size].latent // settings.params.patch_size) ** 2
    text = settings.family.tokens(settings) // settings.batch - image
    plain = make_step(ours, work)
    steps = {
        "routed": make_step(Routed(ours, routes, [image] * settings.batch), work),
        "plain": plain,
        "control": plain,
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            seconds = clock(step)
            if number:
                times[name].append(seconds)
    foretold = 1 - saved_share(model, routes, image=image, text=text)
    print(f"{settings}; routes {' '.join(written)}; {image} image tokens, {text} of text")
    print(f"{clock.kind} time, {rounds} rounds; products of the blocks, forward: {foretold:.3f} of all")
    print("| step | ms | ratio to plain (least .. most) |\n| --- | --- | --- |")
    for name, seconds in times.items():
        pairs = sorted(a / b for a, b in zip(seconds, times["plain"], strict=True))
        ratio = f"{statistics.median(pairs):.3f} ({pairs[0]:.3f} .. {pairs[-1]:.3f})"
        print(f"| {name} | {statistics.median(seconds) * 1e3:.0f} | {ratio} |")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_arguments(parser, FAMILIES, family="kandinsky5")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--routes", nargs="+", default=["2:-2:0.5"])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.device.type == "cpu":
        torch.set_num_threads(1)
    settings = settings_of(given, FAMILIES[given.family], checkpointing=given.checkpointing)
    measure(settings, given.routes, given.rounds)


if __name__ == "__main__":
    main()
