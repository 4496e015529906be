"""lumina_train.py as users run it, on nano models: what it trains, saves and resumes, and users' mistakes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.warm_python import ColdPython, WarmPython

ROOT = Path(__file__).resolve().parents[2]
BF16, STOCHASTIC, FP32 = ("--mixed_precision=bf16",), ("--mixed_precision=bf16", "--full_bf16"), ()
PRECISIONS = {"bf16": BF16, "full_bf16": STOCHASTIC, "fp32": FP32}
LAUNCHER = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0"


class Runs:
    """Starts runs in one folder of outputs and caches."""

    def __init__(self, run_script: Callable, python: WarmPython | ColdPython, nano, folder: Path) -> None:
        self.script, self.python, self.nano, self.folder = run_script, python, nano, folder
        pictures = folder / "photos é"
        pictures.mkdir()
        for name in ("cat", "coffee", "astronaut"):
            for source in (ROOT / "examples/photos").glob(f"{name}.*"):
                shutil.copy(source, pictures)
        self.dataset = self.described("data", "")
        self.output = folder / "output"
        self.prompts = folder / "prompts.txt"
        self.prompts.write_text("a cat --w 32 --h 32 --s 2 --d 0\n")

    def described(self, name: str, more: str) -> Path:
        """Write a dataset file of the pictures, with more lines about their folder."""
        path = self.folder / f"{name}.toml"
        path.write_text(
            "[general]\ncaption_extension = '.txt'\n[[datasets]]\nresolution = 32\nbatch_size = 1\n"
            f"[[datasets.subsets]]\nimage_dir = '{self.folder / 'photos é'}'\n{more}\n"
        )
        return path

    def words(self, name: str, *more: str) -> list[str]:
        """Return the arguments of a run; later ones win."""
        nano = self.nano
        return [
            *(f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2={nano.gemma2}", f"--ae={nano.ae}"),
            *(f"--dataset_config={self.dataset}", f"--output_dir={self.output}", f"--output_name={name}"),
            *("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--max_train_steps=4"),
            *("--learning_rate=1e-4", "--seed=5", "--max_data_loader_n_workers=0", *more),
        ]

    def __call__(self, name: str, *more: str, code: int = 0) -> str:
        """Run lumina_train.py; return what it told."""
        result = self.script(ROOT / "lumina_train.py", *self.words(name, *more))
        assert result.code == code, result.err
        assert code == 0 or "Traceback" not in result.err
        return result.err + result.out

    def in_two_processes(self, name: str, *more: str, code: int = 0) -> str:
        """Have accelerate run it; return what both told. Where they fail, its own code is 1."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        words = [*LAUNCHER.split(), str(ROOT / "lumina_train.py"), *self.words(name, *more)]
        messages = self.folder / "messages"
        with messages.open("w") as file:
            script = self.python.start(words, environment, file.fileno(), file.fileno())
            script.join(200)
            script.kill()
        assert script.exitcode == code, messages.read_text()
        return messages.read_text()

    def path(self, name: str) -> Path:
        """Return the file that a run saved."""
        return self.output / f"{name}.safetensors"

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return its tensors."""
        return load_file(self.path(name))

    def metrics(self, name: str) -> list[dict[str, float]]:
        """Return the numbers of its steps."""
        lines = (self.output / f"{name}.metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def runs(run_script, python, nano, tmp_path_factory) -> Runs:
    return Runs(run_script, python, nano, tmp_path_factory.mktemp("finetune"))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def bf16(runs) -> str:
    """The name of a run in bf16 that saves a state on the way."""
    runs("bf16", *BF16, "--save_state", "--save_every_n_steps=2")
    return "bf16"


@pytest.fixture(scope="module", params=PRECISIONS)
def whole(request, runs) -> tuple[str, tuple[str, ...]]:
    """A run in one precision: its name, and what it has of flags."""
    name, flags = request.param, PRECISIONS[request.param]
    if name == "bf16":
        request.getfixturevalue("bf16")
    else:
        runs(name, *flags)
    return name, flags


def test_the_file_is_one_of_the_family(whole, runs) -> None:
    name, _ = whole
    before, after = load_file(runs.nano.dit), runs.weights(name)
    assert before.keys() == after.keys()
    assert all(before[key].shape == after[key].shape for key in before)
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    few = {key for key, tensor in after.items() if tensor.dtype != dtype}
    assert all("t_embedder" in key or "norm_final" in key for key in few)
    assert any(not torch.equal(before[k].to(after[k].dtype), after[k]) for k in before)
    with safe_open(runs.path(name), "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "lumina-2"
    assert metadata["ss_base_model_version"] == "lumina2" and metadata["ss_steps"] == "4"
    assert not any("network" in key for key in metadata)
    assert metadata["ss_weights"] == "trained"


def test_every_layer_has_learnt(whole, runs) -> None:
    name, _ = whole
    before, after = load_file(runs.nano.dit), runs.weights(name)
    still = [k for k in before if before[k].ndim == 2 and torch.equal(before[k].to(after[k].dtype), after[k])]
    assert still == []


def test_the_file_can_be_drawn_with_and_trained_on(whole, runs, run_script, tmp_path: Path) -> None:
    name, flags = whole
    path, nano = runs.path(name), runs.nano
    result = run_script(
        ROOT / "lumina_minimal_inference.py",
        *(f"--pretrained_model_name_or_path={path}", f"--gemma2_path={nano.gemma2}", f"--ae_path={nano.ae}"),
        *(f"--output_dir={tmp_path}", "--prompt=a cat", "--image_width=32", "--image_height=32"),
        *("--steps=2", "--seed=1", "--device=cpu"),
    )
    assert result.code == 0, result.err
    assert Image.open(result.out.split()[-1]).size == (32, 32)
    runs("again", f"--pretrained_model_name_or_path={path}", *flags, "--max_train_steps=1")
    before, after = runs.weights(name), runs.weights("again")
    assert before.keys() == after.keys() and not equal(before, after)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(whole, runs) -> None:
    """By a time limit that is over with the first batch."""
    name, flags = whole
    leg = f"{name}-leg"
    runs(leg, *flags, "--max_train_minutes=0.00001", code=75)
    assert not runs.path(leg).exists()
    runs(leg, *flags, "--resume=latest")
    assert equal(runs.weights(leg), runs.weights(name))


def test_the_same_result_in_other_ways(runs, bf16) -> None:
    """Swapped blocks, checkpointing and, where nothing is clipped, updates during backward change no bit."""
    runs("other", *BF16, "--blocks_to_swap=4", "--gradient_checkpointing")
    assert equal(runs.weights("other"), runs.weights(bf16))
    runs("unclipped", *BF16, "--max_grad_norm=0")
    for ways in (["--fused_backward_pass"], ["--blockwise_fused_optimizers", "--blocks_to_swap=6"]):
        runs("other", *BF16, "--max_grad_norm=0", *ways)
        assert equal(runs.weights("other"), runs.weights("unclipped")), ways


def test_a_state_goes_on_in_another_way(runs, bf16) -> None:
    """Saved in the middle of a plain run, and gone on from with swapped blocks."""
    (state,) = runs.output.glob(f"{bf16}-step00000002-state")
    runs("other", *BF16, f"--resume={state}", "--blocks_to_swap=3")
    assert equal(runs.weights("other"), runs.weights(bf16))


def test_small_updates_are_not_lost_in_bf16(runs) -> None:
    """At a rate that moves hardly any bf16 weight in a step, the exact weights go where those in fp32 go."""
    rate = ("--learning_rate=2e-6", "--max_train_steps=8", "--save_precision=float")
    runs("exact", *BF16, *rate)
    runs("single", *FP32, *rate)
    start, exact, single = load_file(runs.nano.dit), runs.weights("exact"), runs.weights("single")
    key = "layers.0.feed_forward.w1.weight"
    moved, wanted = exact[key] - start[key].bfloat16().float(), single[key] - start[key]
    assert exact[key].dtype == torch.float32
    assert (exact[key] != exact[key].bfloat16().float()).any()
    assert torch.nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), 0) > 0.8


@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor"])
def test_it_learns(runs, optimizer) -> None:
    """Three pictures by heart, with updates during backward and an optimizer of each kind."""
    args = ["--optimizer_args", "relative_step=False", "scale_parameter=False"]
    words = [
        *(f"--optimizer_type={optimizer}", "--learning_rate=1e-3", "--max_train_steps=24"),
        *("--fused_backward_pass", "--timestep_sampling=uniform"),
        *(args if optimizer == "Adafactor" else ()),
    ]
    runs("learner", *words)
    losses = [record["loss/current"] for record in runs.metrics("learner") if "loss/current" in record]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


def test_watching_a_run(runs) -> None:
    """Average, previews, validation and accumulation."""
    dataset = runs.described("held out", "num_repeats = 2")
    dataset.write_text(dataset.read_text().replace("batch_size = 1", "batch_size = 1\nvalidation_count = 1"))
    runs(
        *("watched", f"--dataset_config={dataset}", *BF16, "--learning_rate=1e-3", "--ema"),
        *("--ema_sample=both", f"--sample_prompts={runs.prompts}", "--sample_every_n_steps=2"),
        *("--sample_at_first", "--validate_every_n_steps=2", "--gradient_accumulation_steps=2"),
        *("--save_every_n_steps=2", "--save_last_n_files=1", "--max_train_steps=4"),
    )
    saved, average = runs.weights("watched"), runs.weights("watched-ema")
    assert saved.keys() == average.keys() and not equal(saved, average)
    names = sorted(path.name for path in (runs.output / "sample").glob("watched*.png"))
    assert len(names) == 6 and sum("-ema" in name for name in names) == 3, names
    records = runs.metrics("watched")
    validation = [record["loss/validation"] for record in records if "loss/validation" in record]
    assert len(validation) == 2


def test_the_average_goes_on_from_a_state(runs) -> None:
    flags = (*BF16, "--ema", "--save_state", "--save_every_n_steps=2")
    runs("mean", *flags)
    (state,) = runs.output.glob("mean-step00000002-state")
    runs("mean2", *BF16, "--ema", f"--resume={state}")
    assert equal(runs.weights("mean-ema"), runs.weights("mean2-ema"))


def test_two_processes_train_as_one(runs) -> None:
    """Two pictures a step, as one process with a batch of two: but for the order of sums."""
    pair = runs.described("pair", "")
    pair.write_text(pair.read_text().replace("batch_size = 1", "batch_size = 2"))
    runs("one", f"--dataset_config={pair}", "--max_train_steps=2")
    runs.in_two_processes("two", "--max_train_steps=2")
    one, two, start = runs.weights("one"), runs.weights("two"), load_file(runs.nano.dit)
    for key in ("layers.0.feed_forward.w1.weight", "layers.3.attention.qkv.weight"):
        assert (one[key] - two[key]).norm() < 0.1 * (one[key] - start[key]).norm(), key


def test_a_folder_for_diffusers(runs) -> None:
    runs("folder", "--save_model_as=diffusers_safetensors", *BF16)
    folder = runs.output / "folder"
    assert (folder / "transformer/config.json").is_file()
    runs("from folder", f"--pretrained_model_name_or_path={folder}", *BF16, "--max_train_steps=1")
    assert runs.weights("from folder").keys() == load_file(runs.nano.dit).keys()


def test_a_dry_run(runs) -> None:
    told = runs("dry", *BF16, "--dry_run", "--blocks_to_swap=2")
    assert "trained numbers: all of the DiT" in told
    assert "weights" in told and "gradients" in told
    assert not runs.path("dry").exists()


def quantised(runs: Runs) -> list[str]:
    path = runs.folder / "int8.safetensors"
    words = [f"--pretrained_model_name_or_path={runs.nano.dit}", f"--output={path}", "--base_quant=int8"]
    result = runs.script(ROOT / "tools/quantize_model.py", *words)
    assert result.code == 0, result.err
    return [f"--pretrained_model_name_or_path={path}"]


def with_lines(more: str) -> Callable[[Runs], list[str]]:
    return lambda runs: [f"--dataset_config={runs.described('mistaken', more)}"]


def in_dataset(more: str) -> Callable[[Runs], list[str]]:
    def words(runs: Runs) -> list[str]:
        path = runs.described("mistaken", "")
        path.write_text(path.read_text().replace("batch_size = 1", f"batch_size = 1\n{more}"))
        return [f"--dataset_config={path}"]

    return words


MISTAKES = {
    "a file in 8 bits": (quantised, "holds weights that are quantised (int8), which cannot be trained"),
    "8 bits": (["--fp8_base"], "--fp8_base cannot be used here: the weights themselves are trained"),
    "fp16": (["--mixed_precision=fp16"], "--mixed_precision fp16 cannot train whole models"),
    "full fp16": (["--full_fp16"], "--full_fp16 cannot be used here: gradients of whole models overflow"),
    "accumulation": (
        ["--fused_backward_pass", "--gradient_accumulation_steps=2"],
        "--fused_backward_pass drops each gradient at once",
    ),
    "preservation": (
        with_lines("custom_attributes.diff_output_preservation = true"),
        "diff_output_preservation asks the untrained model",
    ),
    "strength": (
        in_dataset("network_multiplier = 0.5"),
        "network_multiplier = 0.5 is the strength of a network",
    ),
    "comparison": (
        ["--sample_compare_base"],
        "it draws with the untrained model, which is not there any more",
    ),
    "a flag of a LoRA": (["--network_dim=8"], "this one trains the model itself"),
    "rate that is found": (
        ["--optimizer_type=Prodigy", "--learning_rate=1", *BF16],
        "--optimizer_type Prodigy keeps one record for all weights",
    ),
    "more blocks than there are": (["--blocks_to_swap=7"], "but the model has 6 blocks"),
    "a pickle": (["--save_model_as=ckpt"], "a whole model is not saved as a pickle"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(name, runs, run_script, tmp_path: Path) -> None:
    more, message = MISTAKES[name]
    words = more(runs) if callable(more) else more
    result = run_script(ROOT / "lumina_train.py", *runs.words("never", *words, f"--output_dir={tmp_path}"))
    assert result.code == 2, result.err
    assert message in result.err and "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.glob("*.safetensors"))


def test_several_processes_cannot_update_during_backward(runs) -> None:
    told = runs.in_two_processes("never", "--fused_backward_pass", code=1)
    assert "that of 2 processes is there at the end only" in told


def test_another_precision_cannot_go_on(runs) -> None:
    runs("early", *BF16, "--save_state_on_train_end", "--max_train_steps=1")
    told = runs("late", *FP32, f"--resume={runs.output / 'early-state'}", code=2)
    assert "--mixed_precision is no, but was bf16" in told
    assert "--pretrained_model_name_or_path" in told


def test_a_model_of_few_tensors_is_told(runs, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    tensors = load_file(runs.nano.dit)
    del tensors["layers.0.attention.qkv.weight"]
    save_file(tensors, broken)
    told = runs("never", f"--pretrained_model_name_or_path={broken}", code=2)
    assert "layers.0.attention.qkv" in told
