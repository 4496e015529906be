"""Random command lines of the training scripts, on nano models: does each of them end as it should?

    python -m tests.random_runs --minutes 20 --seed 3
    python -m tests.random_runs --minutes 20 --seed 3 --pretended_gpu

A run may train (exit code 0), or say in a sentence why it does not (2; 71 where memory is too small). A
traceback, or another exit code, is a finding. A command line that trains runs once more, with other ways to
save memory: if it then saves other weights, that is a finding too. Findings are printed as they come, with
the flags to try again; the exit code is 1 if there were any. The same seed draws the same command lines.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATASET = ROOT / "dataset_configs" / "quickstart.toml"
REFUSED = (2, 71)
SECONDS = 300  # that a run may take

Choice = tuple[float, Sequence[str]]  # how often something is chosen at all, and between what
OPTIMIZERS = (
    "AdamW",
    "Adafactor",
    "Lion",
    "Prodigy",
    "SGDNesterov",
    "Adam",
    "torch.optim.RAdam",
    "DAdaptAdam",
)
ANY_RUN: tuple[Choice, ...] = (
    (
        1.0,
        [
            "--mixed_precision=bf16",
            "--mixed_precision=bf16",
            "--mixed_precision=no",
            "--mixed_precision=fp16",
        ],
    ),
    (0.7, [f"--optimizer_type={name}" for name in OPTIMIZERS]),
    (0.2, ["--gradient_accumulation_steps=2"]),
    (0.3, ["--max_grad_norm=0.01", "--max_grad_norm=0"]),
    (0.2, ["--loss_type=huber --huber_c=0.1", "--loss_type=smooth_l1"]),
    (0.3, ["--timestep_sampling=sigmoid", "--timestep_sampling=sigma --weighting_scheme=sigma_sqrt"]),
    (0.2, ["--ema", "--ema --ema_decay=0.9"]),
    (0.15, ["--tread_routes=1:-2:0.5"]),
    (0.2, ["--noise_offset=0.1", "--multires_noise_iterations=3", "--ip_noise_gamma=0.05"]),
    (0.1, ["--scheduled_sampling_max_step_offset=3 --scheduled_sampling_probability=0.8"]),
    (0.15, ["--max_batch_tokens=300"]),
    (0.15, ["--validation_split=0.25 --validate_every_n_steps=2"]),
    (0.1, ["--save_every_n_steps=2 --save_state"]),
    (0.1, ["--lr_scheduler=constant_with_warmup --lr_warmup_steps=2", "--lr_scheduler=cosine"]),
    (0.1, ["--vae_batch_size=3", "--max_data_loader_n_workers=2"]),
    (0.15, ["--attn_mode=torch", "--attn_mode=varlen"]),
    (0.1, ["--torch_compile --dynamo_backend=eager", "--torch_compile --dynamo_backend=aot_eager"]),
)
OF_NETWORKS: tuple[Choice, ...] = (
    (1.0, ["--network_dim=4", "--network_dim=8 --network_alpha=4"]),
    (0.2, ["--network_dropout=0.1"]),
    (0.15, ["--scale_weight_norms=0.5"]),
    (0.4, [f"--base_quant={scheme}" for scheme in ("int8", "int4", "nf4", "fp8")]),
    (0.1, ["--quant_matmul", "--fp8_base", "--fp8_base --fp8_scaled"]),
    (0.2, [f"--text_encoder_quant={scheme}" for scheme in ("int8", "int4", "nf4", "fp8")]),
    (0.1, ["--full_bf16"]),
    (0.1, ["--unet_lr=1e-3"]),
)
NETWORK_ARGS: tuple[Choice, ...] = (
    (0.2, ["rank_dropout=0.1"]),
    (0.2, ["module_dropout=0.2"]),
)
LORA_ARGS: tuple[Choice, ...] = ((0.3, ["use_dora=True"]), (0.2, ["loraplus_lr_ratio=4"]))
LYCORIS_ARGS: tuple[Choice, ...] = (
    (1.0, [f"algo={name}" for name in ("lokr", "loha", "locon", "ia3", "diag-oft")]),
    (0.3, ["preset=attn-mlp"]),
)
OF_WEIGHTS: tuple[Choice, ...] = ((0.3, ["--full_bf16"]), (0.4, ["--fused_backward_pass"]))
OF_MEMORY: tuple[Choice, ...] = (
    (
        0.7,
        [
            "--gradient_checkpointing",
            "--gradient_checkpointing --checkpoint_mode=full",
            "--gradient_checkpointing --checkpoint_mode=feed_forward",
            "--gradient_checkpointing --checkpoint_every_n_blocks=2",
            "--gradient_checkpointing --cpu_offload_checkpointing",
            "--checkpoint_mode=none",
        ],
    ),
    (
        0.5,
        [
            "--blocks_to_swap=1",
            "--blocks_to_swap=3",
            "--blocks_to_swap=4 --block_swap_ring_size=1",
            "--blocks_to_swap=2 --block_swap_ring_size=3",
            "--blocks_to_swap=4 --use_pinned_memory_for_block_swap",
        ],
    ),
)


@dataclass(frozen=True)
class Drawn:
    """A command line: the script, its flags, and flags that save memory and change nothing else."""

    family: str
    script: str
    flags: tuple[str, ...]
    memory: tuple[str, ...]


def draw(chance: random.Random) -> Drawn:
    """Draw a command line."""
    family = chance.choice(("lumina", "kandinsky5"))
    flags = _chosen(ANY_RUN, chance)
    if chance.random() < 0.3:
        return Drawn(family, f"{family}_train.py", (*flags, *_chosen(OF_WEIGHTS, chance)), _saving(chance))
    flags += _chosen(OF_NETWORKS, chance)
    own = chance.random() < 0.6
    flags += (f"--network_module={f'networks.lora_{family}' if own else 'lycoris.kohya'}",)
    more = _chosen(NETWORK_ARGS, chance) + _chosen(LORA_ARGS if own else LYCORIS_ARGS, chance)
    return Drawn(
        family,
        f"{family}_train_network.py",
        (*flags, "--network_train_unet_only", *(("--network_args", *more) if more else ())),
        _saving(chance),
    )


def _chosen(choices: Sequence[Choice], chance: random.Random) -> tuple[str, ...]:
    taken = [chance.choice(between) for often, between in choices if chance.random() < often]
    return tuple(word for words in taken for word in words.split())


def _saving(chance: random.Random) -> tuple[str, ...]:
    while not (found := _chosen(OF_MEMORY, chance)):
        pass
    return found


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    code: int
    said: str
    saved: Path

    @property
    def trouble(self) -> str:
        """What is wrong with it, or nothing."""
        _, traceback, rest = self.said.partition("Traceback (most recent call last):\n")
        if traceback:
            error = next((line for line in rest.splitlines() if not line.startswith(" ")), "")
            return f"traceback: {error}"
        last = (self.said.strip().splitlines() or ["said nothing"])[-1]
        return "" if self.code in (0, *REFUSED) else f"exit code {self.code}: {last[-200:]}"


class Runner:
    """Runs command lines in a folder of its own."""

    def __init__(self, folder: Path, *, pretended_gpu: bool) -> None:
        from tools.make_nano_models import make_nano_kandinsky5, make_nano_models

        self._folder, self._on_gpu, self._count = folder, pretended_gpu, 0
        self.refused = 0  # runs that said why they do not train
        lumina, kandinsky = make_nano_models(folder / "lumina"), make_nano_kandinsky5(folder / "kandinsky5")
        self._models = {
            "lumina": [
                *(f"--pretrained_model_name_or_path={lumina.dit}", f"--gemma2={lumina.gemma2}"),
                f"--ae={lumina.ae}",
            ],
            "kandinsky5": [
                *(f"--dit={kandinsky.t2i}", f"--text_encoder_qwen={kandinsky.qwen}"),
                *(f"--text_encoder_clip={kandinsky.clip}", f"--vae={kandinsky.vae}"),
            ],
        }

    def words(self, drawn: Drawn, out: Path, *more: str) -> list[str]:
        """Return the whole command line of a run that saves in `out`."""
        return [
            *(drawn.script, *self._models[drawn.family], f"--dataset_config={DATASET}"),
            *(f"--cache_directory={self._folder / f'cache_{drawn.family}'}", f"--output_dir={out}"),
            *("--output_name=it", "--learning_rate=1e-3", "--max_train_steps=4", "--seed=7"),
            *("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", *more, *drawn.flags),
        ]

    def run(self, drawn: Drawn, *more: str) -> Outcome:
        """Run a command line, with more flags."""
        self._count += 1
        out = self._folder / f"run{self._count:04d}"
        start = ["-m", "tests.pretended_gpu"] if self._on_gpu else []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            ["timeout", str(SECONDS), sys.executable, *start, *self.words(drawn, out, *more)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        self.refused += done.returncode in REFUSED
        return Outcome(done.returncode, done.stdout + done.stderr, out / "it.safetensors")


def differences(one: Path, other: Path) -> str:
    """Say how two files of weights differ; nothing if they are the same."""
    import torch
    from safetensors.torch import load_file

    ours, theirs = load_file(one), load_file(other)
    if ours.keys() != theirs.keys():
        return "other names"
    far = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    return f"{len(far)} of {len(ours)} tensors differ, such as {far[0]}" if far else ""


def findings(runner: Runner, drawn: Drawn, *, pretended_gpu: bool) -> Iterator[str]:
    """Run a command line, then with less memory; yield what is wrong, with the flags to try again."""
    if pretended_gpu and drawn.script.endswith("_train.py"):
        # Swapped blocks have their gradients on the CPU: two devices add up the norm in another order.
        drawn = replace(drawn, flags=(*drawn.flags, "--max_grad_norm=0"))
    plain = runner.run(drawn)
    if plain.trouble:
        yield f"{plain.trouble}\n  {shlex.join([drawn.script, *drawn.flags])}"
    if plain.trouble or plain.code != 0:
        return
    saving = runner.run(drawn, *drawn.memory)
    found = saving.trouble
    if saving.code == 0 and not found:
        found = differences(plain.saved, saving.saved)
    if found:
        yield f"{found}\n  {shlex.join([drawn.script, *drawn.flags])}\n  then with {shlex.join(drawn.memory)}"
    for outcome in (plain, saving):
        shutil.rmtree(outcome.saved.parent, ignore_errors=True)


def main(arguments: Sequence[str]) -> int:
    """Run command lines until the time is over."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "output" / "random_runs")
    parser.add_argument("--pretended_gpu", action="store_true", help="on the device of tests/pretended_gpu")
    given = parser.parse_args(arguments)
    shutil.rmtree(given.folder, ignore_errors=True)
    runner = Runner(given.folder, pretended_gpu=given.pretended_gpu)
    chance, end = random.Random(given.seed), time.monotonic() + 60 * given.minutes
    lines = found = 0
    while lines == 0 or time.monotonic() < end:
        lines += 1
        for finding in findings(runner, draw(chance), pretended_gpu=given.pretended_gpu):
            found += 1
            print(f"line {lines}: {finding}", flush=True)
    print(f"{lines} command lines, {runner.refused} refused, {found} findings")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
