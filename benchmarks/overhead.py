"""What a training step costs outside the model, at nano size, where nothing else hides it.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --rounds 200 --json benchmarks/results/overhead.json

A whole run on nano models (LoRA of rank 16, AdamW, clipping, metrics, cached latents and texts). Counted is
the processor time of the main thread from the end of one step to the end of the next, less that in the
model's forward and in backward; threads that load work beside it. Counted too, and told apart, is what it
takes to let go of all that forward noted for backward. Other work on the machine makes it longer, so the time
in the model stands beside it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.report import Result, Row, add_arguments, matmul_gflops, require, show, write  # noqa: E402
from library.options.group import parse_options  # noqa: E402
from library.options.train import LuminaTrainOptions  # noqa: E402
from library.training.update import Updater  # noqa: E402
from library.training.watch.metrics import Metrics  # noqa: E402
from lumina_train_network import LuminaTrainer  # noqa: E402
from tools.make_nano_models import make_nano_models  # noqa: E402

UNCOUNTED = 5  # first steps, which make what the others find
P = ParamSpec("P")
R = TypeVar("R")


class Stopwatch:
    """Processor seconds of this thread in the model, and at the end of each step."""

    def __init__(self) -> None:
        self.in_model = 0.0
        self.releases: list[float] = []  # seconds from the end of backward until its graph is gone
        self._left_model = 0.0
        self.ends: list[tuple[float, float]] = []  # (now, in the model until now)

    def model(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return a function whose time counts as the model's."""

        def timed(*arguments: P.args, **named: P.kwargs) -> R:
            begin = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self._left_model = time.thread_time()
                self.in_model += self._left_model - begin

        return timed

    def holder_of_graph(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return a function that ends with backward, and whose end lets go of the graph."""

        def timed(*arguments: P.args, **named: P.kwargs) -> R:
            result = function(*arguments, **named)
            self.releases.append(time.thread_time() - self._left_model)
            return result

        return timed

    def end_of_step(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return a function with which a step ends."""

        def marked(*arguments: P.args, **named: P.kwargs) -> R:
            result = function(*arguments, **named)
            self.ends.append((time.thread_time(), self.in_model))
            return result

        return marked

    def outside(self) -> list[tuple[float, float]]:
        """Return seconds outside the model and in it, of each step that counts."""
        pairs = list(zip(self.ends[UNCOUNTED:], self.ends[UNCOUNTED + 1 :], strict=False))
        return [(now[0] - then[0] - (now[1] - then[1]), now[1] - then[1]) for then, now in pairs]


@contextmanager
def watched(stopwatch: Stopwatch) -> Iterator[None]:
    """Time the model and the steps of every run until the block ends."""
    places = [
        (LuminaTrainer, "velocities", stopwatch.model),
        (torch.Tensor, "backward", stopwatch.model),
        (Updater, "_backward", stopwatch.holder_of_graph),
        (Metrics, "step", stopwatch.end_of_step),
    ]
    before = [getattr(owner, name) for owner, name, _ in places]
    for (owner, name, wrap), function in zip(places, before, strict=True):
        setattr(owner, name, wrap(function))
    try:
        yield
    finally:
        for (owner, name, _), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def command(folder: Path, steps: int) -> list[str]:
    """Write models and pictures, and return the command line of a run on them."""
    nano = make_nano_models(folder / "models")
    pictures = folder / "pictures" / "1_thing"
    pictures.mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (64, 64), (30 * number, 90, 200)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a picture")
    return [
        *(f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2={nano.gemma2}", f"--ae={nano.ae}"),
        *(f"--train_data_dir={pictures.parent}", "--caption_extension=.txt", "--resolution=64"),
        *(f"--output_dir={folder / 'out'}", "--network_module=networks.lora_lumina", "--network_dim=16"),
        *("--cache_latents", "--cache_text_encoder_outputs", f"--max_train_steps={steps}", "--seed=1"),
        *("--max_data_loader_n_workers=2", "--console_log_level=WARNING"),
    ]


def measure(rounds: int) -> Result:
    """Return the times of a step outside the model and in it."""
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, watched(stopwatch):
        words = command(Path(folder), rounds + UNCOUNTED + 1)
        LuminaTrainer(parse_options(LuminaTrainOptions, words)).train()
    outside, inside = ([*seconds] for seconds in zip(*stopwatch.outside(), strict=True))
    rows = [
        _row("outside the model", outside, inside),
        _row("of it, to let go of its graph", stopwatch.releases[-len(inside) :], inside),
        _row("in the model", inside, inside),
    ]
    return Result("A nano step", "thread seconds", rows, matmul_gflops(), rounds)


def _row(name: str, seconds: Sequence[float], inside: Sequence[float]) -> Row:
    """Return a row of the report: times, also as a part of those in the model."""
    ratios = sorted(a / b for a, b in zip(seconds, inside, strict=True))
    return Row(name, statistics.median(seconds), statistics.median(ratios), ratios[0], ratios[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, rounds=60)
    given = parser.parse_args()
    require("pydantic", "toml")  # as every run does
    torch.set_num_threads(1)
    result = measure(given.rounds)
    show(result, "overhead", in_ms=True)
    print(f"\n{result.rows[0].median * 1e3:.2f} ms a step outside the model")
    write([result], given.json)


if __name__ == "__main__":
    main()
