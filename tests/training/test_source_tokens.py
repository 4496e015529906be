"""What is foretold of a model that edits pictures counts the tokens of the pictures that it edits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from kandinsky5_train_network import Kandinsky5Trainer
from library.data.items import Geometry
from library.models.qwen2_5_vl import QwenInput
from library.models.qwen_grid import picture_grid, token_count
from library.options.group import parse_options
from library.options.train_kandinsky5 import Kandinsky5TrainOptions
from library.training.context import RunContext
from library.training.look.dry_run import Rehearsal
from library.training.look.memory_estimate import MemoryEstimate
from library.training.look.meter import Meter
from library.training.look.texts import prompts_of_run
from library.training.prepare import prepare
from tests.picture_sets import manifest_of, write_picture, write_pictures
from tools.make_nano_models import make_nano_kandinsky5

CAPTIONS = {"small": "make it red", "large": "make it blue", "alone": "a very long caption " * 3}
SIDE = 448  # Qwen sees half of it, in squares of 28 pixels
PICTURE_TOKENS = (SIDE // 2 // 28) ** 2
AROUND = 3  # tokens behind the caption beside the picture's own


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Kandinsky5Trainer:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("edits")
    nano = make_nano_kandinsky5(folder / "nano")
    write_pictures(folder / "after", CAPTIONS, ((64, 64), (SIDE, SIDE), (64, 64)))
    (folder / "before").mkdir()
    (folder / "apart").mkdir()
    for ending in ("png", "txt"):
        (folder / "after" / f"alone.{ending}").rename(folder / "apart" / f"alone.{ending}")
    for number, stem in enumerate(("small", "large")):
        write_picture(folder / "before" / f"{stem}.png", (SIDE, SIDE), seed=number)
    subset = f"conditioning_data_dir = '{folder / 'before'}'\n[[datasets.subsets]]\n"
    subset += f"image_dir = '{folder / 'apart'}'\ncaption_extension = '.txt'"
    dataset = "bucket_no_upscale = true"
    manifest_of(folder / "after", dataset=dataset, subset=subset, resolution=SIDE, edits=True)
    words = [
        *(f"--dit={nano.i2i}", f"--vae={nano.vae}", f"--text_encoder_qwen={nano.qwen}", "--seed=1"),
        *(f"--text_encoder_clip={nano.clip}", f"--dataset_config={folder / 'after.toml'}"),
        *("--network_module=networks.lora_kandinsky5", f"--output_dir={folder / 'out'}"),
        *("--qwen_max_token_length=100", "--max_train_steps=2", "--console_log_level=WARNING"),
    ]
    return Kandinsky5Trainer(parse_options(Kandinsky5TrainOptions, words))


def test_the_most_that_the_text_encoder_takes(trainer: Kandinsky5Trainer) -> None:
    context = RunContext.decide(trainer, prepare(trainer))
    assert MemoryEstimate(trainer, context).work.tokens == 100 + PICTURE_TOKENS + AROUND
    assert MemoryEstimate(trainer, context, tokens=20).work.tokens == 20


@pytest.mark.parametrize("side", [64, 1344], ids=["texts take more", "pictures take more"])
def test_what_encoding_with_sources_takes_was_foretold(trainer: Kandinsky5Trainer, side: int) -> None:
    """The most bytes of tensors that are alive at once while two captions with their sources are encoded."""
    context = RunContext.decide(trainer, prepare(trainer))
    manifest = context.prepared.manifest
    size = Geometry((side, side), (0, 0), (side, side))
    items = tuple(
        replace(item, geometry=size, source=replace(item.source, geometry=size)) if item.source else item
        for item in manifest.items
    )
    larger = replace(context.prepared, manifest=replace(manifest, items=items))
    estimate = MemoryEstimate(trainer, replace(context, prepared=larger))
    encoders = trainer.load_text_encoders(torch.device("cpu"), context.dtype)
    grid = picture_grid((side, side))
    picture = [encoders.qwen.params.image_token_id] * token_count(grid)
    ids = [*picture, *[0] * (estimate.work.tokens - len(picture))]
    # Of another dtype, so that they are copied to the encoder's, as they would be to a GPU.
    patches_NP = torch.zeros(grid[1] * grid[2], encoders.qwen.params.vision.patch_width, dtype=torch.float64)
    with Meter(("cpu",)) as meter:
        encoders.qwen.encode([QwenInput(ids, patches_NP, grid)] * 2)
    assert estimate._caching_texts(2) == pytest.approx(meter.peak, rel=0.05)
    texts = estimate._encoding_texts(2, trained=False)[0]
    assert (estimate._caching_texts(2) > 1.2 * texts) == (side == 1344)


def test_a_dry_run_counts_what_the_model_is_given(
    trainer: Kandinsky5Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimated: list[int] = []
    monkeypatch.setattr(Rehearsal, "_model_lines", lambda _, tokens, *__: estimated.append(tokens) or [])
    rehearsal = Rehearsal(trainer, prepare(trainer))
    report = rehearsal.report()
    encoders = trainer.load_text_encoders(torch.device("cpu"), torch.float32)
    prompts = list(prompts_of_run(trainer, rehearsal.manifest))
    with torch.no_grad():
        lengths = [len(c.tokens_LD) for c in trainer.encode_prompts(encoders, prompts)]
    assert [min(trainer.count_tokens(prompt)) for prompt in prompts] == lengths
    assert estimated == [max(lengths)] and max(lengths) > PICTURE_TOKENS
    (told,) = (
        re.search(r"3 texts of (\d+) to (\d+) tokens", line) for line in report if " texts of " in line
    )
    assert (int(told[1]), int(told[2])) == (min(lengths), max(lengths))
