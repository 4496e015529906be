"""Batches follow the plan, depend on nothing but the draw, and are the same from pixels and from caches."""

import threading
from contextlib import closing
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

import library.data.loader as loader_module
from library.core.errors import DataError
from library.data.batch import Batch
from library.data.cached import CachePlace, LatentCache, TextCache
from library.data.captions import caption_variants
from library.data.images import is_flipped, load_pixels
from library.data.loader import BatchLoader, Caches, LoaderSettings
from library.data.plan import Plan
from library.data.prompt import Prompt
from library.data.tensors import mask_to_latent_size, pixels_to_tensor
from library.training.caching import PassRun, cache_latents, cache_texts
from tests.data.test_delivery import Carrier
from tests.picture_sets import STRIDE, Encoders, manifest_of, write_picture, write_pictures

SEED, STEPS = 5, 12
CAPTIONS = {stem: f"{stem}, red, green, blue" for stem in ("cat", "dog", "bird", "fish", "cow")}
SIZES = ((64, 64), (96, 48), (80, 80))
SUBSET = "flip_aug = true\nshuffle_caption = true\nnum_repeats = 2"


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "pictures", CAPTIONS, SIZES)


@pytest.fixture
def manifest(folder):
    return manifest_of(folder, dataset="batch_size = 2", subset=SUBSET)


def loader_of(manifest, caches=None, **settings):
    plan = Plan(manifest, seed=SEED, world=settings.get("world", 1), accumulation=2)
    settings = {"seed": SEED, "total_steps": STEPS} | settings
    settings.pop("world", None)
    return BatchLoader(manifest, plan, caches or Caches(), LoaderSettings(**settings))


def cached(manifest, place, max_variants=4):
    encoders, run = Encoders(), PassRun(batch_size=2)
    latents = LatentCache(place, "ae")
    texts = TextCache(place, "gemma", max_variants=max_variants)
    cache_latents(latents, manifest.items, encoders.load_picture_encoder, run)
    cache_texts(texts, manifest.items, encoders.load_text_encoder, run)
    return Caches(latents, texts)


MEMORY, DISK = CachePlace(False, dtype="fp32"), CachePlace(True, dtype="fp32")


def take(loader, start=0, stop=STEPS):
    with closing(loader.batches(start, stop)) as batches:
        return list(batches)


def assert_same_batches(these, those):
    assert [place[:2] for place in these] == [place[:2] for place in those]
    for (*_, this), (*_, that) in zip(these, those, strict=True):
        assert_same(this, that)


def assert_same(this: Batch, that: Batch):
    for field in fields(Batch):
        a, b = getattr(this, field.name), getattr(that, field.name)
        if isinstance(a, Tensor):
            assert torch.equal(a, b), field.name
        elif field.name in ("latents", "pixels", "masks") and a is not None:
            assert all(torch.equal(*pair) for pair in zip(a, b, strict=True)), field.name
        elif field.name == "conditions" and a is not None:
            assert all(torch.equal(c.tokens_LD, d.tokens_LD) for c, d in zip(a, b, strict=True))
        else:
            assert a == b, field.name


def test_batches_come_in_the_order_of_the_plan(manifest):
    plan = Plan(manifest, seed=SEED, accumulation=2)
    expected = [
        (step, micro, batch.draws) for step in range(STEPS) for micro, batch in enumerate(plan.step(step))
    ]
    assert [(step, micro, batch.draws) for step, micro, batch in take(loader_of(manifest))] == expected


def test_any_step_can_come_first(manifest):
    whole = take(loader_of(manifest))
    for start in (1, 5, STEPS - 1):
        assert_same_batches(take(loader_of(manifest), start), [place for place in whole if place[0] >= start])
    assert take(loader_of(manifest), 3, 3) == []


@pytest.mark.parametrize("online", [True, False])
def test_the_number_of_workers_changes_nothing(manifest, online):
    caches = Caches() if online else cached(manifest, DISK)
    alone = take(loader_of(manifest, caches, workers=0))
    for workers in (1, 4):
        assert_same_batches(take(loader_of(manifest, caches, workers=workers)), alone)


@pytest.mark.parametrize("options", ["random_crop = true", "color_aug = true"])
def test_augmentation_is_of_the_draw_and_not_of_the_worker(folder, options):
    manifest = manifest_of(folder, dataset="batch_size = 2", subset=f"{SUBSET}\n{options}")
    alone = take(loader_of(manifest))
    assert_same_batches(take(loader_of(manifest, workers=3)), alone)
    assert_same_batches(take(loader_of(manifest, workers=2), 7), [p for p in alone if p[0] >= 7])


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_see_what_one_would(folder, world):
    manifest = manifest_of(folder, dataset="batch_size = 2", subset="num_repeats = 7")
    plan = Plan(manifest, seed=SEED, world=world, accumulation=2)
    ranks = [take(loader_of(manifest, rank=rank, world=world)) for rank in range(world)]
    empty = 0
    for step in range(STEPS):
        for micro, micro_batch in enumerate(plan.step(step)):
            parts = [batch for rank in ranks for (s, m, batch) in rank if (s, m) == (step, micro)]
            assert len(parts) == world
            assert sorted(d.slot for batch in parts for d in batch.draws) == list(
                range(len(micro_batch.draws))
            )
            empty += sum(not batch.draws for batch in parts)
    assert empty > 0, "the data was meant to leave a process without pictures somewhere"


def test_a_process_without_pictures_gets_a_batch_without_draws(manifest):
    batch = loader_of(manifest).batch([])
    assert (batch.draws, batch.names, batch.captions) == ((), (), ())
    assert batch.weights_B.shape == (0,)
    assert batch.latents is batch.pixels is batch.conditions is batch.masks is None


@pytest.mark.parametrize("place", [MEMORY, DISK])
def test_caches_give_what_encoding_on_the_way_gives(folder, place):
    write_picture(folder / "cat.png", (64, 64), seed=50, alpha=True)
    manifest = manifest_of(folder, dataset="batch_size = 2", subset=f"{SUBSET}\nalpha_mask = true")
    caches = cached(manifest, place)
    online = take(loader_of(manifest, Caches(texts=caches.texts)))
    encoders = Encoders()
    flips = 0
    for (*_, batch), (*_, made) in zip(take(loader_of(manifest, caches)), online, strict=True):
        assert made.latents is None and batch.pixels is None
        assert batch.names == made.names
        expected = encoders.encode_pictures(torch.stack(made.pixels))
        assert torch.equal(torch.stack(batch.latents), expected)
        assert (batch.masks is None) == (made.masks is None)
        assert all(map(torch.equal, batch.masks or (), made.masks or ()))
        assert batch.captions == made.captions
        for condition, expected in zip(
            batch.conditions, encoders.encode_texts(list(map(Prompt, batch.captions))), strict=True
        ):
            assert torch.equal(condition.tokens_LD, expected.tokens_LD)
        flips += sum(is_flipped(manifest.items[d.item], d.key(SEED)) for d in batch.draws)
    draws = sum(len(batch.draws) for *_, batch in online)
    assert 0 < flips < draws


def test_flipped_draws_show_the_mirrored_picture(manifest):
    for *_, batch in take(loader_of(manifest)):
        for draw, pixels in zip(batch.draws, batch.pixels, strict=True):
            item = manifest.items[draw.item]
            plain = pixels_to_tensor(load_pixels(item, None, flip=False)[0])
            expected = plain.flip(-1) if is_flipped(item, draw.key(SEED)) else plain
            assert torch.equal(pixels, expected)
            assert pixels.min() >= -1 and pixels.max() <= 1


def test_latents_are_fp32_whatever_the_cache_holds(manifest):
    caches = cached(manifest, CachePlace(False, dtype="bf16"))
    *_, batch = take(loader_of(manifest, caches), 0, 1)[0]
    for latents in batch.latents:
        assert latents.dtype == torch.float32
        assert torch.equal(latents, latents.bfloat16().float())


def test_captions_are_unlimited_on_the_way_and_variants_from_the_cache(folder):
    manifest = manifest_of(folder, subset="shuffle_caption = true\nnum_repeats = 40")
    online, from_cache = set(), set()
    for caches, drawn in ((Caches(), online), (cached(manifest, MEMORY, max_variants=3), from_cache)):
        loader = loader_of(manifest, caches)
        for step in range(40):
            for micro in loader._plan.step(step):
                batch = loader.batch(micro.draws)
                drawn.update(zip(batch.names, batch.captions, strict=True))
    variants = {(str(i.path), text) for i in manifest.items for text in caption_variants(i, 3)}
    assert from_cache == variants
    assert len(online) > len(variants)


def test_weights_masks_and_multiplier(tmp_path):
    """Regularisation pictures weigh less; beside one that has a mask, a picture without one counts whole."""
    train = write_pictures(tmp_path / "train", {"a": "a"})
    regularisation = write_pictures(tmp_path / "reg", {"r": "r"})
    write_picture(regularisation / "r.png", (64, 64), seed=9, alpha=True)
    manifest = manifest_of(
        train,
        dataset="batch_size = 2\nnetwork_multiplier = 0.5",
        subset=f"[[datasets.subsets]]\nimage_dir = '{regularisation}'\ncaption_extension = '.txt'\n"
        "is_reg = true\nalpha_mask = true",
    )
    *_, batch = take(loader_of(manifest, prior_loss_weight=0.25), 0, 1)[0]
    weights = dict(zip(batch.names, batch.weights_B.tolist(), strict=True))
    assert weights == {str(train / "a.png"): 1.0, str(regularisation / "r.png"): 0.25}
    assert batch.network_multiplier == 0.5
    masks = dict(zip(batch.names, batch.masks, strict=True))
    assert torch.equal(masks[str(train / "a.png")], torch.ones(8, 8))
    (item,) = [i for i in manifest.items if i.subset.is_reg]
    expected = mask_to_latent_size(load_pixels(item, None, flip=False)[1], STRIDE)
    assert torch.equal(masks[str(item.path)], expected)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_picture_that_goes_bad_is_named_in_the_main_thread(manifest, workers):
    victim = manifest.items[2]
    victim.path.write_bytes(b"gone bad")
    good = 0
    with pytest.raises(DataError, match=victim.path.name):
        for *_, batch in loader_of(manifest, workers=workers).batches(0, STEPS):
            assert str(victim.path) not in batch.names
            good += 1
    first = next(n for n, (*_, d) in enumerate(_draws(manifest)) if any(x.item == victim.index for x in d))
    assert good == first, "the batches before it still come"


def _draws(manifest):
    plan = Plan(manifest, seed=SEED, accumulation=2)
    return [(s, m, b.draws) for s in range(STEPS) for m, b in enumerate(plan.step(s))]


@pytest.mark.parametrize("kind", ["latents", "texts"])
def test_a_cache_entry_that_goes_bad_is_named(manifest, folder, kind):
    caches = cached(manifest, DISK)
    for path in (folder / ".flow-cache" / kind).rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{kind}.*was damaged"):
        take(loader_of(manifest, caches, workers=2))


def test_stopping_early_ends_the_threads(manifest):
    before = threading.active_count()
    batches = loader_of(manifest, workers=4).batches(0, STEPS)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_pinning_moves_every_tensor_and_changes_no_value(folder, monkeypatch):
    """Without a GPU nothing can be pinned or carried, so copies stand for both."""
    pinned = []

    def copy(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", copy)
    monkeypatch.setattr(loader_module, "carrier_for", lambda device: Carrier())
    manifest = manifest_of(folder, dataset="batch_size = 2", subset="alpha_mask = true")
    caches = cached(manifest, MEMORY)
    (*_, plain), *_ = take(loader_of(manifest, caches), 0, 1)
    loader = loader_of(manifest, caches, device=torch.device("cuda"))
    (*_, batch), *_ = take(loader, 0, 1)
    assert_same(batch, plain)
    tensors = [*batch.latents, batch.weights_B, *batch.masks, *(c.tokens_LD for c in batch.conditions)]
    assert all(any(torch.equal(tensor, other) for other in pinned) for tensor in tensors)
    held_out = [item for item in manifest.items if item.index == 0]
    pinned.clear()
    (alone,) = loader.held_out(held_out)
    assert any(tensor is alone.latents[0] for tensor in pinned)


def test_what_else_a_batch_needs_is_added_where_there_are_pictures(manifest):
    """By the threads that load, and not for pictures that are held out."""
    plan = Plan(manifest, seed=SEED, world=6)
    names = []

    def complete(batch):
        names.append(threading.current_thread().name)
        return replace(batch, sigmas=(0.5,) * len(batch.draws))

    settings = LoaderSettings(seed=SEED, total_steps=STEPS, rank=5, workers=2)
    loader = BatchLoader(manifest, plan, Caches(), settings, complete=complete)
    batches = [batch for *_, batch in take(loader)]
    assert all(batch.sigmas == (0.5,) * len(batch.draws) for batch in batches)
    assert not all(batch.draws for batch in batches)
    assert names and all(name.startswith("ahead") for name in names)
    (held_out,) = loader.held_out(manifest.items[:1])
    assert held_out.sigmas == ()


# --- held-out pictures ---


@pytest.mark.parametrize("source", ["pixels", "cache"])
def test_held_out_pictures_come_one_by_one_and_are_always_the_same(folder, source):
    subset = "flip_aug = true\nshuffle_caption = true\ncaption_dropout_rate = 0.9"
    if source == "pixels":
        subset += "\nrandom_crop = true\ncolor_aug = true"
    manifest = manifest_of(folder, dataset="batch_size = 2\nvalidation_count = 3", subset=subset)
    items = [manifest.items[index] for index in manifest.validation]
    caches = cached(manifest, MEMORY) if source == "cache" else Caches()
    seen = []
    for seed, workers in ((1, 0), (2, 3)):
        loader = loader_of(manifest, caches, seed=seed, workers=workers)
        seen.append(list(loader.held_out(items)))
    for item, this, that in zip(items, *seen, strict=True):
        assert_same(this, that)
        assert this.names == (str(item.path),) and this.captions == (item.text,)
        pixels, _ = load_pixels(item, None, flip=False)
        expected = pixels_to_tensor(pixels)
        if source == "cache":
            (expected,) = Encoders().encode_pictures(expected[None])
        assert torch.equal(*(this.latents if source == "cache" else this.pixels), expected)
