"""How far losses are from those of the plain fp32 run, in every precision: whole runs on nano models.

    python benchmarks/losses.py                                       # the table of docs/memory.md
    python benchmarks/losses.py --family lumina --seeds 1 --steps 6 --json losses.json

A LoRA of rank 8 with AdamW at 2e-3, pictures of 128 px in batches of two, cached latents and texts, on the
CPU. A seed draws the order of pictures, noise, sigma and the LoRA's start. Runs of one seed differ in
precision only; with --mixed_precision the autoencoder and the text encoder have it too, unless a flag says
otherwise. Told is the largest difference at any step of any seed, relative to the fp32 run's figure at that
step, and beside it the limit that tests hold it to.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.report import require  # noqa: E402
from kandinsky5_train_network import Kandinsky5Trainer  # noqa: E402
from library.options.group import parse_options  # noqa: E402
from library.options.train import LuminaTrainOptions  # noqa: E402
from library.options.train_kandinsky5 import Kandinsky5TrainOptions  # noqa: E402
from lumina_train_network import LuminaTrainer  # noqa: E402
from tools.make_nano_models import make_nano_kandinsky5, make_nano_models  # noqa: E402

FAMILIES = {
    "lumina": (LuminaTrainOptions, LuminaTrainer),
    "kandinsky5": (Kandinsky5TrainOptions, Kandinsky5Trainer),
}
MODES = {  # flags: how far losses, and how far norms of gradients, may be from the plain fp32 run's
    "--mixed_precision bf16": (0.03, 0.03),
    "--mixed_precision bf16 --no_half_vae": (0.01, 0.03),
    "--mixed_precision fp16": (0.003, 0.01),
    "--base_quant int8": (0.005, 0.02),
    "--base_quant int8 --quant_matmul": (0.005, 0.02),
    "--base_quant fp8": (0.02, 0.06),
    "--base_quant fp8 --quant_matmul": (0.02, 0.06),
    "--base_quant int4": (0.06, 0.2),
    "--base_quant nf4": (0.1, 0.3),
}
CAPTIONS = ("a red house", "two cats on a wooden table", "rain", "a portrait of a woman in an orange suit")
SIDE = 128


@dataclass(frozen=True)
class Curve:
    """Losses and gradient norms of a run, step by step."""

    losses: list[float]
    norms: list[float]


@dataclass(frozen=True)
class Deviation:
    """The largest relative differences of a mode from the plain fp32 run, and their limits."""

    family: str
    mode: str
    loss: float
    loss_limit: float
    norm: float
    norm_limit: float

    @property
    def passed_a_limit(self) -> bool:
        """Whether a figure is larger than it may be."""
        return self.loss > self.loss_limit or self.norm > self.norm_limit

    def line(self) -> str:
        """Return a row of the table."""
        loss, norm = f"{self.loss:.2%} | {self.loss_limit:.1%}", f"{self.norm:.2%} | {self.norm_limit:.1%}"
        end = "  <- passed a limit" if self.passed_a_limit else ""
        return f"| {self.family} | `{self.mode}` | {loss} | {norm} |{end}"


class Runs:
    """Trains nano models of one family on the same pictures."""

    def __init__(self, family: str, folder: Path, steps: int) -> None:
        self._options, self._trainer = FAMILIES[family]
        self._steps, self._folder = steps, folder
        pictures = folder / "pictures" / "1_things"
        pictures.mkdir(parents=True)
        draw = np.random.default_rng(0)
        for number, caption in enumerate(CAPTIONS):
            corners = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            corners.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(pictures / f"{number}.png")
            (pictures / f"{number}.txt").write_text(caption)
        self._words = [
            *_models(family, folder / "models"),
            *(f"--train_data_dir={pictures.parent}", "--caption_extension=.txt", f"--resolution={SIDE}"),
            *("--train_batch_size=2", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"),
            *("--network_dim=8", "--learning_rate=2e-3", f"--max_train_steps={steps}"),
            *("--output_name=it", "--console_log_level=ERROR"),
        ]

    def train(self, mode: str, seed: int) -> Curve:
        """Return the figures of a run."""
        out = Path(tempfile.mkdtemp(dir=self._folder))
        words = [*self._words, f"--output_dir={out}", f"--seed={seed}", *mode.split()]
        self._trainer(parse_options(self._options, words)).train()
        lines = (out / "it.metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [line for line in map(json.loads, lines) if "loss/current" in line]
        assert len(steps) == self._steps
        return Curve([step["loss/current"] for step in steps], [step["grad_norm"] for step in steps])


def _models(family: str, folder: Path) -> list[str]:
    """Make the nano models of a family; return the words that name them."""
    if family == "lumina":
        nano = make_nano_models(folder)
        models = [f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2={nano.gemma2}", f"--ae={nano.ae}"]
        return [*models, "--network_module=networks.lora_lumina"]
    nano = make_nano_kandinsky5(folder)
    models = [f"--dit={nano.t2i}", f"--text_encoder_qwen={nano.qwen}", f"--text_encoder_clip={nano.clip}"]
    return [*models, f"--vae={nano.vae}", "--network_module=networks.lora_kandinsky5"]


def measure(family: str, seeds: Sequence[int], steps: int) -> Iterator[Deviation]:
    """Yield how far each mode of a family is from the plain run."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(family, Path(folder), steps)
        plain = {seed: runs.train("", seed) for seed in seeds}
        for mode, (loss_limit, norm_limit) in MODES.items():
            curves = [(runs.train(mode, seed), plain[seed]) for seed in seeds]
            loss = max(_apart(mine.losses, theirs.losses) for mine, theirs in curves)
            norm = max(_apart(mine.norms, theirs.norms) for mine, theirs in curves)
            yield Deviation(family, mode, loss, loss_limit, norm, norm_limit)


def _apart(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the largest relative difference, leaving out norms that fp16 cannot hold."""
    pairs = zip(mine, theirs, strict=True)
    return max(abs(ours - plain) / abs(plain) for ours, plain in pairs if math.isfinite(ours))


def main() -> int:
    """Measure and print; the exit code is 1 if a limit is passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    require("pydantic", "toml")  # as every run does
    torch.set_num_threads(1)
    print("| family | mode | loss, at most off | limit | gradient norm | limit |\n|---|---|---|---|---|---|")
    found = []
    for family in given.family:
        for each in measure(family, given.seeds, given.steps):
            found.append(each)
            print(each.line(), flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n", encoding="utf-8")
    return int(any(each.passed_a_limit for each in found))


if __name__ == "__main__":
    sys.exit(main())
