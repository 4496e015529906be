"""kandinsky5_train.py as users run it, on nano models, for both tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.parity.runs import write_config, write_pictures
from tools.make_nano_models import make_nano_kandinsky5

ROOT = Path(__file__).resolve().parents[2]
PICTURES = {"fox": ((64, 64), "a red fox"), "cup": ((64, 64), "a coffee cup")}
PRECISIONS = {"bf16": ("--mixed_precision=bf16",), "fp32": ()}


class Runs:
    """Starts runs in one folder of outputs and caches."""

    def __init__(self, run_script: Callable, folder: Path) -> None:
        self.script, self.folder, self.output = run_script, folder, folder / "output"
        self.models = make_nano_kandinsky5(folder / "models")
        after = write_pictures(folder / "after", PICTURES)
        before = write_pictures(folder / "before", PICTURES, seed=6)
        self.data = {
            "t2i": write_config(folder / "t2i.toml", after),
            "i2i": write_config(folder / "i2i.toml", after, subset=f"conditioning_data_dir = '{before}'"),
        }

    def __call__(self, name: str, *more: str, task: str = "t2i", code: int = 0) -> str:
        """Run kandinsky5_train.py; return what it told. Later words win."""
        models = self.models
        result = self.script(
            ROOT / "kandinsky5_train.py",
            *(f"--dit={getattr(models, task)}", f"--vae={models.vae}", f"--text_encoder_qwen={models.qwen}"),
            *(f"--text_encoder_clip={models.clip}", f"--dataset_config={self.data[task]}"),
            *(
                f"--output_dir={self.output}",
                f"--output_name={name}",
                f"--cache_directory={self.folder / 'c'}",
            ),
            *("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--max_train_steps=4"),
            *("--learning_rate=1e-4", "--seed=5", "--max_data_loader_n_workers=0", *more),
        )
        assert result.code == code, result.err
        assert code == 0 or "Traceback" not in result.err
        return result.err + result.out

    def path(self, name: str) -> Path:
        """Return the file that a run saved."""
        return self.output / f"{name}.safetensors"

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return its tensors."""
        return load_file(self.path(name))


@pytest.fixture(scope="module")
def runs(run_script, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(run_script, tmp_path_factory.mktemp("kandinsky"))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module", params=PRECISIONS)
def whole(request: pytest.FixtureRequest, runs: Runs) -> tuple[str, tuple[str, ...]]:
    """A run in one precision that saves a state on the way."""
    name, flags = request.param, PRECISIONS[request.param]
    runs(name, *flags, "--save_state", "--save_every_n_steps=2")
    return name, flags


def test_the_file_is_one_of_the_family(whole, runs: Runs) -> None:
    name, _ = whole
    before, after = load_file(runs.models.t2i), runs.weights(name)
    assert before.keys() == after.keys()
    assert all(before[key].shape == after[key].shape for key in before)
    still = [k for k in before if before[k].ndim == 2 and torch.equal(before[k].to(after[k].dtype), after[k])]
    assert still == []
    with safe_open(runs.path(name), "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_kandinsky5_task"] == "t2i" and metadata["ss_steps"] == "4"
    assert "/lora" not in metadata["modelspec.architecture"]


def test_the_file_can_be_drawn_with_and_trained_on(whole, runs: Runs, tmp_path: Path) -> None:
    name, flags = whole
    models = runs.models
    result = runs.script(
        ROOT / "kandinsky5_minimal_inference.py",
        *(f"--dit={runs.path(name)}", f"--vae={models.vae}", f"--text_encoder_qwen={models.qwen}"),
        *(f"--text_encoder_clip={models.clip}", f"--output_dir={tmp_path}", "--prompt=a cat", "--device=cpu"),
        *("--image_width=64", "--image_height=64", "--steps=1", "--seed=1"),
    )
    assert result.code == 0, result.err
    assert Image.open(result.out.split()[-1]).size == (64, 64)
    runs("again", f"--dit={runs.path(name)}", *flags, "--max_train_steps=1")
    assert not equal(runs.weights("again"), runs.weights(name))


def test_resume_swap_checkpointing_and_fused_updates_change_no_bit(whole, runs: Runs) -> None:
    name, flags = whole
    (state,) = runs.output.glob(f"{name}-step00000002-state")
    for ways in ([f"--resume={state}"], ["--blocks_to_swap=2", "--gradient_checkpointing"]):
        runs("other", *flags, *ways)
        assert equal(runs.weights("other"), runs.weights(name)), ways
    runs("unclipped", *flags, "--max_grad_norm=0")
    runs("other", *flags, "--max_grad_norm=0", "--fused_backward_pass", "--blocks_to_swap=3")
    assert equal(runs.weights("other"), runs.weights("unclipped"))


def test_a_model_that_edits_is_trained_and_watched(runs: Runs) -> None:
    prompts = runs.folder / "prompts.txt"
    prompts.write_text("a red fox --w 64 --h 64 --s 1 --d 1 --ci before/cup.png\n")
    more = ("--mixed_precision=bf16", "--ema", "--gradient_accumulation_steps=2", "--source_dropout_rate=0.5")
    more += ("--full_bf16", "--max_train_steps=2")
    more += (f"--sample_prompts={prompts}", "--sample_at_first", "--optimizer_type=Adafactor")
    runs("edits", *more, task="i2i")
    before = load_file(runs.models.i2i)
    assert before.keys() == runs.weights("edits").keys() == runs.weights("edits-ema").keys()
    assert len(list((runs.output / "sample").glob("edits*.png"))) == 1


def test_a_dry_run_and_mistakes(runs: Runs) -> None:
    told = runs("dry", "--dry_run", "--mixed_precision=bf16")
    assert "trained numbers: all of the DiT" in told and not runs.path("dry").exists()
    for words, message in (
        (["--base_quant=int8"], "--base_quant cannot be used here: the weights themselves are trained"),
        (["--mixed_precision=fp16"], "cannot train whole models"),
        (["--network_module=networks.lora_kandinsky5"], "this one trains the model itself"),
        (["--fused_backward_pass", "--gradient_accumulation_steps=2"], "drops each gradient at once"),
    ):
        assert message in runs("never", *words, code=2)
