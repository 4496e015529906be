"""How long things take to begin, beside the imports that diffusers' training scripts begin with.

    python benchmarks/startup.py

Nano checkpoints (tools/make_nano_models.py) and four small pictures are made in a temporary folder, and
caches are filled by a run that is not counted. Then these take turns, each a process: `--help`, a misspelt
flag, a dry run, a run of one step with warm caches; torch alone; and the imports of diffusers' LoRA scripts,
which come before those look at any flag. CPU time of the process and its children.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.report import add_arguments, missing_packages, require, show, take_turns, write  # noqa: E402
from tools.make_nano_models import make_nano_models  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "lumina_train_network.py")
THEIRS = (
    "import torch, transformers, accelerate, peft; from peft import LoraConfig; "
    "from transformers import AutoTokenizer, Gemma2Model; "
    "from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, "
    "Lumina2Transformer2DModel; from diffusers.optimization import get_scheduler; "
    "from diffusers.training_utils import cast_training_params"
)


def make_run(folder: Path) -> list[str]:
    """Make models and pictures; return a command that trains one step."""
    make_nano_models(folder, seed=0)
    pictures = folder / "dataset" / "1_cat"
    pictures.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a cat on a hill")
    flags = {
        "pretrained_model_name_or_path": folder / "lumina.safetensors",
        "gemma2": folder / "gemma2.safetensors",
        "ae": folder / "ae.safetensors",
        "train_data_dir": pictures.parent,
        "caption_extension": ".txt",
        "resolution": "64",
        "output_dir": folder / "out",
        "output_name": "one_step",
        "network_module": "networks.lora_lumina",
        "network_dim": 4,
        "max_train_steps": 1,
        "mixed_precision": "bf16",
    }
    named = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    switches = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")
    return [sys.executable, SCRIPT, *named, *switches]


class Command:
    """A process to run; `code`: the exit code that it must have."""

    def __init__(self, command: list[str], code: int = 0) -> None:
        self.command, self.code = command, code

    def __call__(self) -> None:
        """Run it to its end."""
        done = subprocess.run(
            self.command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if done.returncode != self.code:
            raise RuntimeError(f"{self.command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def children_cpu_time() -> float:
    """Seconds of CPU that ended children took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser, rounds=5)
    args = parser.parse_args()
    require("pydantic", "toml")  # as every run does
    with tempfile.TemporaryDirectory() as name:
        train = make_run(Path(name))
        Command(train)()  # fills the caches
        contestants = {
            "--help": Command([sys.executable, SCRIPT, "--help"]),
            "a misspelt flag": Command([sys.executable, SCRIPT, "--learning_rat", "1"], code=2),
            "--dry_run": Command([*train, "--dry_run"]),
            "one step, warm caches": Command(train),
            "import torch": Command([sys.executable, "-c", "import torch"]),
        }
        if missing := missing_packages("diffusers", "peft"):
            print(f"diffusers' scripts do not take part: {missing} not installed.", file=sys.stderr)
        else:
            contestants["imports of diffusers' scripts"] = Command([sys.executable, "-c", THEIRS])
        result = take_turns(
            "start-up, nano", contestants, rival=list(contestants)[-1], rounds=args.rounds,
            clock=children_cpu_time,
        )  # fmt: skip
    show(result, "startup")
    write([result], args.json)


if __name__ == "__main__":
    main()
