"""Caches of edited pictures hold the sources too, and batches are the same from caches and from files."""

from __future__ import annotations

import logging
import re
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from library.data.batch import Batch
from library.data.cached import CachePlace, LatentCache, TextCache
from library.data.images import drawn_source, is_flipped, load_source
from library.data.items import Manifest
from library.data.loader import BatchLoader, Caches, LoaderSettings
from library.data.plan import Plan
from library.data.prompt import Prompt
from library.data.tensors import pixels_to_tensor
from library.training.caching import Counts, PassRun, cache_latents, cache_texts
from tests.picture_sets import Encoders, manifest_of, tokens_of, write_picture, write_pictures

CAPTIONS = {"a": "make it red", "b": "make it blue", "c": "make it red", "d": ""}
SIZES = ((64, 64), (96, 48))
DISK, MEMORY = CachePlace(True, dtype="fp32"), CachePlace(False, dtype="fp32")
SUBSET = "flip_aug = true\nnum_repeats = 4\ncaption_dropout_rate = 0.4"
SEED, STEPS, DROPOUT = 5, 12, 0.4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures, of which `a`, `b` and `c` are edits (the third of the same source as the first)."""
    folder = write_pictures(tmp_path / "after", CAPTIONS, SIZES)
    (tmp_path / "before").mkdir()
    for number, stem in enumerate("ab"):
        write_picture(tmp_path / "before" / f"{stem}.png", SIZES[number], seed=20 + number)
    (tmp_path / "before" / "c.png").write_bytes((tmp_path / "before" / "a.png").read_bytes())
    (tmp_path / "alone").mkdir()
    for ending in ("png", "txt"):
        (folder / f"d.{ending}").rename(tmp_path / "alone" / f"d.{ending}")
    return folder


def look(folder: Path, subset: str = SUBSET, dataset: str = "batch_size = 2") -> Manifest:
    alone = (
        f"[[datasets.subsets]]\nimage_dir = '{folder.parent / 'alone'}'\ncaption_extension = '.txt'\n{subset}"
    )
    edits = f"conditioning_data_dir = '{folder.parent / 'before'}'\n{subset}\n{alone}"
    return manifest_of(folder, dataset=dataset, subset=edits, edits=True)


def fill(manifest: Manifest, place: CachePlace = MEMORY, dropout: float = 0.0, batch_size: int = 2):
    """Run both passes; return (caches, encoders, counts of latents, counts of texts)."""
    encoders, run = Encoders(), PassRun(batch_size)
    latents = LatentCache(place, "ae")
    texts = TextCache(place, "qwen", max_variants=4, source_dropout=dropout)
    counts = (
        cache_latents(latents, manifest.items, encoders.load_picture_encoder, run),
        cache_texts(texts, manifest.items, encoders.load_text_encoder, run),
    )
    return Caches(latents, texts), encoders, *counts


def batches(manifest: Manifest, caches: Caches, workers: int = 0, dropout: float = DROPOUT) -> list[Batch]:
    settings = LoaderSettings(seed=SEED, total_steps=STEPS, workers=workers, source_dropout=dropout)
    loader = BatchLoader(manifest, Plan(manifest, seed=SEED), caches, settings)
    with closing(loader.batches(0, STEPS)) as made:
        return [batch for *_, batch in made]


@pytest.mark.parametrize("place", [MEMORY, DISK])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_entry_has_the_latents_of_the_source_bit_for_bit(
    folder: Path, place: CachePlace, batch_size: int
) -> None:
    write_picture(folder.parent / "before" / "c.png", (64, 64), seed=30)
    manifest = look(folder)
    caches, encoders, counts, _ = fill(manifest, place, batch_size=batch_size)
    assert counts == Counts(cached=0, encoded=4)
    assert encoders.pictures == 2 * (4 + 3), "mirrored too"
    assert max(shape[0] for shape in encoders.picture_batches) <= batch_size
    for item in manifest.items:
        for flip in (False, True):
            kept = caches.latents.get(item, flip=flip)
            if item.source is None:
                assert kept.source is None
                continue
            pixels_3HW = pixels_to_tensor(load_source(drawn_source(item, None, flip=flip)))
            expected = Encoders().encode_pictures(pixels_3HW[None])[0]
            assert torch.equal(kept.source, expected)
            assert kept.source.shape == kept.picture.shape
            assert not torch.equal(kept.source, kept.picture)


def test_an_entry_holds_the_text_for_each_way_the_source_is_shown(folder: Path) -> None:
    """Two ways for an edit, three where it may go without; a caption and the empty one."""
    manifest = look(folder)
    *_, texts = fill(manifest)
    assert texts.encoded == 2 * (2 + 2) + 1, (
        "two sources, and the picture without one, whose caption is empty"
    )
    *_, texts = fill(manifest, dropout=0.5)
    assert texts.encoded == 8 + 1 + 3, "and two captions and the empty one without a source"
    plain = look(folder, "num_repeats = 4")
    *_, texts = fill(plain, dropout=0.5)
    assert texts.encoded == 2 + 2 + 1, "in neither case the empty one"


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_hold_what_the_draw_shows(folder: Path, workers: int) -> None:
    """From files and from caches: four ways to the same inputs."""
    manifest = look(folder)
    cached, *_ = fill(manifest, dropout=DROPOUT)
    ways = [Caches(latents, texts) for latents in (None, cached.latents) for texts in (None, cached.texts)]
    seen = set()
    for together in zip(*(batches(manifest, way, workers) for way in ways), strict=True):
        for (latents, texts), batch in zip([(way.latents, way.texts) for way in ways], together, strict=True):
            shown = []
            for draw in batch.draws:
                item, key = manifest.items[draw.item], draw.key(SEED)
                flip = is_flipped(item, key)
                shown.append(drawn_source(item, key, flip=flip, dropout=DROPOUT))
                seen.add((bool(item.source), bool(shown[-1]), flip))
            assert batch.sources == (tuple(shown) if any(shown) else ())
            _check_pictures(batch, cached=latents is not None)
            if texts is not None:
                for caption, source, condition in zip(batch.captions, shown, batch.conditions, strict=True):
                    assert torch.equal(condition.tokens_LD, tokens_of(Prompt(caption, source)))
    assert {edit for edit, _, _ in seen} == {True, False}
    assert len([one for one in seen if one[0]]) == 4, "with and without the source, mirrored and not"


def _check_pictures(batch: Batch, *, cached: bool) -> None:
    """The sources of a batch are those that it names, as latents or pixels."""
    held, other = (
        (batch.source_latents, batch.source_pixels) if cached else (batch.source_pixels, batch.source_latents)
    )
    assert other is None
    if not batch.sources:
        assert held is None
        return
    for source, tensor in zip(batch.sources, held, strict=True):
        assert (source is None) == (tensor is None)
        if source is not None:
            expected = pixels_to_tensor(load_source(source))
            if cached:
                (expected,) = Encoders().encode_pictures(expected[None])
            assert torch.equal(tensor, expected)


def test_captions_are_drawn_alike_with_and_without_sources(folder: Path) -> None:
    """The empty caption of caption dropout keeps its source."""
    manifest = look(folder)
    cached, *_ = fill(manifest)
    empty = 0
    for batch in batches(manifest, cached, dropout=0.0):
        sources = batch.sources or (None,) * len(batch.draws)
        for draw, caption, source in zip(batch.draws, batch.captions, sources, strict=True):
            edit = manifest.items[draw.item].source is not None
            assert (source is not None) == edit
            empty += edit and caption == ""
    assert empty > 0


def test_held_out_pictures_always_have_their_source(folder: Path) -> None:
    manifest = look(folder, dataset="batch_size = 2\nvalidation_count = 2")
    cached, *_ = fill(manifest, dropout=1.0)
    items = [manifest.items[index] for index in manifest.validation]
    assert any(item.source for item in items)
    settings = LoaderSettings(seed=SEED, total_steps=STEPS, source_dropout=1.0)
    for caches in (Caches(), cached):
        loader = BatchLoader(manifest, Plan(manifest, seed=SEED), caches, settings)
        for item, batch in zip(items, loader.held_out(items), strict=True):
            expected = drawn_source(item, None, flip=False)
            assert batch.sources == (() if expected is None else (expected,))
            _check_pictures(batch, cached=caches.latents is not None)


def test_exactly_what_a_changed_source_touches_is_encoded_again(folder: Path) -> None:
    fill(look(folder), DISK)
    *_, latents, texts = fill(look(folder), DISK)
    assert (latents.encoded, texts.encoded) == (0, 0)
    write_picture(folder.parent / "before" / "b.png", SIZES[1], seed=99)
    *_, latents, texts = fill(look(folder), DISK)
    assert (latents.encoded, texts.encoded) == (1, 4), "one picture; two texts, mirrored and not"
    (folder.parent / "before" / "b.png").rename(folder.parent / "before" / "b.webp")
    *_, latents, texts = fill(look(folder), DISK)
    assert (latents.encoded, texts.encoded) == (0, 0), "what it is called does not matter"


def test_entries_say_what_they_are_of(folder: Path) -> None:
    fill(look(folder, ""), DISK)
    abouts = set()
    for path in (folder / ".flow-cache" / "texts").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            abouts.add(file.metadata()["about"])
    assert abouts == {"make it red (with c.png)", "make it blue (with b.png)"}, "a.png and c.png are equal"


def test_large_sources_come_first_and_sizes_stay_together(folder: Path) -> None:
    _, encoders, *_ = fill(look(folder), batch_size=1)
    areas = [p.source.geometry.bucket if p.source else (0, 0) for p in encoders.prompts]
    assert areas == sorted(areas, key=lambda size: (-size[0] * size[1], size))
    lengths = [len(p.text) for p in encoders.prompts if p.source and p.source.geometry.bucket == (64, 64)]
    assert lengths == sorted(lengths, reverse=True)


def test_a_pass_tells_its_peak_of_memory(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("flow_scripts.caching")
    logger.addHandler(caplog.handler)
    caplog.set_level("INFO", logger="flow_scripts.caching")
    try:
        fill(look(folder))
    finally:
        logger.removeHandler(caplog.handler)
    told = dict(re.findall(r"(latents|texts): .* has had at most ([\d.]+) GiB of memory so far", caplog.text))
    assert told.keys() == {"latents", "texts"}
    status = Path("/proc/self/status").read_text()
    highest = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20
    assert float(told["texts"]) == pytest.approx(highest, abs=0.02)


def test_a_pass_on_a_gpu_tells_the_gpus_peak(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU, numbers stand for it: what was there before the pass does not count."""
    peaks = {"now": 5 * 2**30}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.update(now=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks["now"])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    logger = logging.getLogger("flow_scripts.caching")
    logger.addHandler(caplog.handler)
    caplog.set_level("INFO", logger="flow_scripts.caching")
    encoders = Encoders()

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        peaks["now"] += 2**28
        return encoders.encode_pictures(pixels)

    run = PassRun(1, device=torch.device("cuda"))
    cache_latents(LatentCache(MEMORY, "ae"), look(folder, "").items, lambda: encode, run)
    logger.removeHandler(caplog.handler)
    assert "at most 1.75 GiB of the GPU's memory" in caplog.text, "seven pictures"
