"""A run of a family that edits pictures, on nano models: what reaches the model, and what is told."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from torch import Tensor

from library.core.errors import ConfigError, DataError
from library.data.batch import Batch
from library.data.images import drawn_source, is_flipped, load_source, source_picture
from library.data.items import Draw
from library.data.prompt import Prompt
from library.data.prompt_files import load_sample_prompts
from library.data.tensors import pixels_to_tensor
from library.options.group import parse_options
from library.options.train import LuminaTrainOptions
from library.training import watchers
from library.training.assembly import Assembly
from library.training.context import RunContext
from library.training.look.contact_sheet import Shown, write_sheet
from library.training.look.dry_run import Rehearsal
from library.training.prepare import prepare
from library.training.state.stop import StopRequest, StopSignals
from lumina_train_network import LuminaTrainer
from tests.picture_sets import manifest_of
from tests.training.assembled import command, context_of, put_together, started
from tests.training.editing_family import EditingTrainer, seen

CAPTIONS = ("make it calm", "make it dark", "make it calm, and bright")
LATENTS, TEXTS = "--cache_latents", "--cache_text_encoder_outputs"
WAYS = [(), (LATENTS,), (TEXTS,), (LATENTS, TEXTS)]
DROPOUT = 0.4


@pytest.fixture(autouse=True)
def fresh_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EditingTrainer, "batches", [])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two edits (one of a source of other proportions), and a picture without a source; all mirrored."""
    folder, noise = tmp_path_factory.mktemp("pairs"), np.random.default_rng(1)

    def draw(path: Path, size: tuple[int, int]) -> None:
        path.parent.mkdir(exist_ok=True)
        pixels = noise.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)

    for number, (name, size) in enumerate((("after", (64, 64)), ("after", (96, 64)), ("alone", (64, 64)))):
        draw(folder / name / f"{number}.png", size)
        (folder / name / f"{number}.txt").write_text(CAPTIONS[number])
    draw(folder / "before" / "0.png", (64, 64))
    draw(folder / "before" / "1.png", (40, 80))
    path = folder / "data.toml"
    path.write_text(
        "[general]\ncaption_extension = '.txt'\nenable_bucket = true\nbucket_reso_steps = 16\n"
        "min_bucket_reso = 32\nbucket_no_upscale = true\nflip_aug = true\nnum_repeats = 3\n"
        "caption_dropout_rate = 0.3\n"
        "[[datasets]]\nresolution = 96\nbatch_size = 2\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder / 'after'}'\n"
        f"conditioning_data_dir = '{folder / 'before'}'\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder / 'alone'}'\n"
    )
    return path


def run_words(nano: object, config: Path, *more: str) -> list[str]:
    """A command line without masks and caches, but for what `more` says."""
    given = [
        w for w in command(nano, config, config.parent / "out") if w not in ("--masked_loss", LATENTS, TEXTS)
    ]
    return [*given, *more]


@pytest.fixture(scope="module")
def ways(nano, config: Path) -> dict[tuple[str, ...], tuple[RunContext, Assembly, list[Batch]]]:
    """A run for each choice of caches, with the batches of two epochs, of pictures of any sizes."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EditingTrainer, "dropout", DROPOUT)
        for way in WAYS:
            exact = ["--cache_dtype=fp32"] if way else []
            given = run_words(nano, config, "--max_batch_tokens=64", *way, *exact)
            context, parts = put_together(given, EditingTrainer)
            for parameter in parts.trainee.parameters():
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
            batches = parts.loader.batches(0, 2 * context.plan.steps_per_epoch)
            made[way] = (context, parts, [batch for *_, batch in batches])
    return made


def latents_of(context: RunContext, pixels: np.ndarray) -> Tensor:
    with torch.no_grad():
        return context.trainer.encode_images(context.inputs.vae.get(), pixels_to_tensor(pixels)[None])[0]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(way) or "no caches")
def test_the_model_gets_the_source_of_the_draw(ways, way: tuple[str, ...]) -> None:
    """Its latents and, behind the text, its tokens: from caches or not."""
    context, parts, batches = ways[way]
    found = set()
    for batch in batches:
        conditions = parts.objective.conditions(batch)
        for draw, caption, condition in zip(batch.draws, batch.captions, conditions, strict=True):
            item, key = context.prepared.manifest.items[draw.item], draw.key(context.seed)
            source = drawn_source(item, key, flip=is_flipped(item, key), dropout=DROPOUT)
            prompt = Prompt(context.trainer.format_prompt(caption), source)
            (expected,) = context.inputs.prompts([prompt])
            torch.testing.assert_close(condition.tokens_LD, expected.tokens_LD, rtol=1e-4, atol=1e-5)
            assert (condition.source_Chw is None) == (source is None)
            if source is not None:
                torch.testing.assert_close(condition.source_Chw, expected.source_Chw, rtol=1e-4, atol=1e-5)
            found.add((item.source is None, source is None, caption == ""))
    assert {one[:2] for one in found} == {(True, True), (False, True), (False, False)}
    assert (False, False, True) in found, "an empty caption was drawn with its source"
    assert (False, True, False) in found, "a caption was drawn without its source"


def test_all_ways_train_alike(ways) -> None:
    with torch.no_grad():
        losses = [
            torch.cat([parts.objective.training_losses(batch) for batch in batches])
            for _, parts, batches in ways.values()
        ]
    for found in losses[1:]:
        torch.testing.assert_close(found, losses[0], rtol=1e-4, atol=1e-5)


def test_a_picture_in_a_batch_has_the_loss_that_it_has_alone_and_the_source_counts(ways) -> None:
    _, parts, batches = ways[(LATENTS, TEXTS)]
    batch = max(batches, key=lambda batch: len(batch.draws))
    assert len(batch.draws) > 1 and any(batch.sources) and not all(batch.sources)
    with torch.no_grad():
        together = parts.objective.training_losses(batch)
        alone = [parts.loader._complete(parts.loader.batch([draw])) for draw in batch.draws]
        apart = torch.cat([parts.objective.training_losses(one) for one in alone])
        torch.testing.assert_close(together, apart, rtol=2e-5, atol=1e-6)
        without = parts.objective.training_losses(replace(batch, source_latents=None))
    for one, other, source in zip(together, without, batch.sources, strict=True):
        assert torch.isclose(one, other) == (source is None)


# --- the passes ---


@pytest.mark.parametrize(("at_once", "sizes"), [(None, [2] * 5), (1000, [10])])
def test_a_family_may_take_all_prompts_at_once(nano, config: Path, monkeypatch, at_once, sizes) -> None:
    """Two edits, mirrored and not, and a picture alone, each with its caption and without."""
    monkeypatch.setattr(EditingTrainer, "at_once", at_once)
    context = context_of(run_words(nano, config, TEXTS, "--text_encoder_batch_size=2"), EditingTrainer)
    context.inputs.fill_caches(context.prepared.manifest)
    assert [len(batch) for batch in EditingTrainer.batches] == sizes
    EditingTrainer.batches.clear()
    context.inputs.prompts([Prompt("one"), Prompt("two"), Prompt("one")])
    assert [len(batch) for batch in EditingTrainer.batches] == ([1, 1] if at_once is None else [2])


def test_validation_pictures_have_their_sources(nano, config: Path) -> None:
    """A run whose validation is done with caches and without gives the same numbers, and others without."""
    validated = config.with_name("validated.toml")
    validated.write_text(config.read_text().replace("batch_size = 2", "batch_size = 2\nvalidation_count = 2"))
    measured = []
    for more in ((), (LATENTS, TEXTS, "--cache_dtype=fp32")):
        context, parts = put_together(run_words(nano, validated, *more), EditingTrainer)
        event = watchers._validation(context, parts, StopRequest(StopSignals(), Path("none"), None))
        assert any(item.source for item in event.items)
        with torch.no_grad():
            measured.append(event._measure())
    torch.testing.assert_close(*measured, rtol=1e-4, atol=1e-5)


# --- sample pictures ---


@pytest.fixture
def prompts(tmp_path: Path, config: Path) -> Path:
    """Three prompts: two with a source (the second of another size), one from text alone."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "room.png").write_bytes((config.parent / "before" / "1.png").read_bytes())
    path = folder / "p.txt"
    path.write_text(
        "make it calm --ci room.png --w 64 --h 64 --s 2 --n ugly\n"
        "make it calm --ci room.png --w 32 --h 64 --s 2\n"
        "a calm room --w 32 --h 32 --s 2\n"
    )
    return path


def test_sample_prompts_are_encoded_with_their_sources(
    nano, config: Path, prompts: Path, monkeypatch
) -> None:
    """Cut to the size of the picture, for the text encoder and as latents; the negative prompt too."""
    given = run_words(nano, config, LATENTS, TEXTS, f"--sample_prompts={prompts}", "--sample_at_first")
    context = context_of(given, EditingTrainer)
    watchers.encode_sample_prompts(context)
    assert context.inputs.vae._model is None and context.inputs.encoders._model is None, "both are let go"
    assert [len(batch) for batch in EditingTrainer.batches] == [1] * 6, "each alone"
    requests = load_sample_prompts(prompts, watchers._defaults(context))
    EditingTrainer.batches.clear()
    conditions, negatives = watchers._encode(context, requests)
    assert EditingTrainer.batches == [], "encoded ahead"
    for number, size in ((0, (64, 64)), (1, (32, 64))):
        source = source_picture(prompts.parent / "room.png", size)
        wanted = latents_of(context, load_source(source))
        for condition, text in (
            (conditions[number], "make it calm"),
            (negatives[number], requests[number].negative_prompt),
        ):
            torch.testing.assert_close(condition.source_Chw, wanted)
            assert torch.equal(condition.tokens_LD[-4:], seen(Prompt(text, source), condition))
    assert conditions[2].source_Chw is negatives[2].source_Chw is None


def test_a_source_that_changes_is_encoded_anew(nano, config: Path, prompts: Path) -> None:
    given = run_words(nano, config, LATENTS, TEXTS, f"--sample_prompts={prompts}", "--sample_at_first")
    context = context_of(given, EditingTrainer)
    (request, *_) = load_sample_prompts(prompts, watchers._defaults(context))
    before, _ = watchers._encode(context, [request])
    (prompts.parent / "room.png").write_bytes((config.parent / "before" / "0.png").read_bytes())
    after, _ = watchers._encode(context, [request])
    assert not torch.allclose(before[0].source_Chw, after[0].source_Chw)
    (prompts.parent / "room.png").unlink()
    with pytest.raises(DataError, match="room.png is not there"):
        watchers._encode(context, [request])


def test_a_run_draws_edits_while_it_trains(
    nano, config: Path, prompts: Path, tmp_path: Path, monkeypatch
) -> None:
    """A prompt whose source is not there, written while it runs, costs that picture only."""

    def encode_then_write(context: RunContext) -> None:
        watchers.encode_sample_prompts(context)
        prompts.write_text(prompts.read_text() + "gone --ci gone.png --s 2 --w 32 --h 32\n")

    monkeypatch.setattr("library.training.run.encode_sample_prompts", encode_then_write)
    more = ["--max_train_steps=2", f"--sample_prompts={prompts}", "--sample_every_n_steps=1", "--seed=3"]
    run = started(run_words(nano, config, LATENTS, *more, f"--output_dir={tmp_path / 'out'}"), EditingTrainer)
    path = run.run()
    assert path.is_file()
    drawn = sorted(file.name.split("_")[1:3] for file in (tmp_path / "out" / "sample").glob("*.png"))
    assert drawn == [[f"00000{step}", f"0{number}"] for step in (1, 2) for number in range(3)]


@pytest.mark.parametrize("trainer", [LuminaTrainer, EditingTrainer])
def test_a_family_that_does_not_edit_refuses_sources(nano, config: Path, prompts: Path, trainer) -> None:
    plain = config.with_name("plain.toml")
    lines = config.read_text().splitlines()
    plain.write_text("\n".join(line for line in lines if not line.startswith("conditioning_data_dir")))
    given = run_words(nano, plain, f"--sample_prompts={prompts}", "--sample_at_first")
    if trainer is LuminaTrainer:
        with pytest.raises(
            ConfigError, match=r"--ci .*room.png cannot be used: this model makes pictures from text"
        ):
            context_of(given, trainer)
        return
    context_of(given, trainer)
    (prompts.parent / "room.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="room.png cannot be decoded"):
        context_of(given, trainer)


# --- what is told ---


def test_a_dry_run_tells_of_sources_and_shows_them(nano, config: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(EditingTrainer, "dropout", 0.25)
    given = run_words(nano, config, LATENTS, TEXTS, "--dry_run", f"--output_dir={tmp_path}")
    trainer = EditingTrainer(parse_options(LuminaTrainOptions, given))
    rehearsal = Rehearsal(trainer, prepare(trainer))
    report = "\n".join(rehearsal.report())
    assert "2 of 3 are trained as edits of a source picture; 1 sources are enlarged" in report
    assert "1 sources have other proportions than what is made of them" in report
    assert "25.0% of their draws go without the source" in report
    assert "texts: 0 of 12 are there already" in report, "2 mirrored or not, 3 alone, and no caption for each"
    assert (
        "alone (datasets[0]) has no conditioning_data_dir: its 1 pictures are trained from their captions"
        in report
    )
    sheet = Image.open(rehearsal.draw_first())
    assert sheet.size[0] > 700


def test_a_tile_shows_the_source_at_the_left(tmp_path: Path, config: Path) -> None:
    for name, colour in (("after", "red"), ("before", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64), colour).save(tmp_path / name / "a.png")
    (tmp_path / "after" / "a.txt").write_text("x")
    manifest = manifest_of(
        tmp_path / "after", subset=f"conditioning_data_dir = '{tmp_path / 'before'}'", edits=True
    )
    for dropout, colours in ((0.0, ["blue", "red"]), (1.0, ["red"])):
        shown = Shown(seed=1, total_steps=1, max_variants=None, source_dropout=dropout)
        write_sheet(tmp_path / "sheet.png", manifest, [Draw(0, 0, 0, 0, 0, 0)], shown)
        row = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))[20]
        painted = [tuple(pixel) for pixel in row.tolist() if tuple(pixel) != (255, 255, 255)]
        assert list(dict.fromkeys(painted)) == [ImageColor.getrgb(colour) for colour in colours]


def test_a_resumed_run_tells_of_a_changed_source(nano, config: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pairs"
    shutil.copytree(config.parent, copy, ignore=shutil.ignore_patterns("out", ".flow-cache"))
    moved = copy / "data.toml"
    moved.write_text(config.read_text().replace(str(config.parent), str(copy)))
    given = run_words(nano, moved, "--save_state", "--max_train_steps=1")
    started(given, EditingTrainer).run()
    again = [*given, "--resume=latest", "--max_train_steps=2"]
    assert not any("dataset" in change for change in context_of(again, EditingTrainer).prepared.changes)
    (copy / "before" / "0.png").write_bytes((copy / "before" / "1.png").read_bytes())
    changes = context_of(again, EditingTrainer).prepared.changes
    assert any("the dataset is not what it was" in change for change in changes)


def test_texts_of_sources_that_are_drawn_anew_cannot_be_cached(nano, config: Path) -> None:
    cropped = config.with_name("cropped.toml")
    cropped.write_text(config.read_text().replace("flip_aug = true", "random_crop = true"))
    with pytest.raises(
        ConfigError, match="random_crop .*--cache_text_encoder_outputs: the text encoder sees"
    ):
        context_of(run_words(nano, cropped, TEXTS), EditingTrainer)
    context, parts = put_together(run_words(nano, cropped), EditingTrainer)
    batch = next(parts.loader.batches(0, 1))[2]
    assert len(parts.objective.conditions(batch)) == len(batch.draws)
