"""The passes encode exactly what is missing, notice every change, and survive being killed."""

import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.core.errors import DataError, NonFiniteError, StorageError
from library.data.batch import Condition
from library.data.cache import CacheStore
from library.data.cached import CachePlace, LatentCache, TextCache
from library.data.captions import draw_caption
from library.data.images import load_pixels
from library.data.prompt import Prompt
from library.data.tensors import mask_to_latent_size, pixels_to_tensor
from library.training import cache_pass
from library.training.caching import Counts, PassRun, cache_latents, cache_texts
from tests.picture_sets import Encoders, manifest_of, tokens_of, write_picture, write_pictures

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = {"a": "a cat", "b": "two dogs, grass", "c": "three birds", "d": "a fish", "e": ""}
SIZES = ((64, 64), (96, 48), (80, 80))
DISK = CachePlace(to_disk=True, dtype="fp32")
MEMORY = CachePlace(to_disk=False, dtype="fp32")
RUN = PassRun(batch_size=2)


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "pictures", CAPTIONS, SIZES)


def fill_latents(manifest, place=DISK, identity="ae 1", run=RUN):
    """Run the pass; return (cache, encoders, counts)."""
    encoders, cache = Encoders(), LatentCache(place, identity)
    counts = cache_latents(cache, manifest.items, encoders.load_picture_encoder, run)
    return cache, encoders, counts


def fill_texts(manifest, place=DISK, identity="gemma 1", run=RUN, **cache_options):
    encoders = Encoders()
    cache = TextCache(place, identity, **({"max_variants": 16} | cache_options))
    counts = cache_texts(cache, manifest.items, encoders.load_text_encoder, run)
    return cache, encoders, counts


def files_in(folder):
    return sorted(folder.rglob("*.safetensors"))


def whole_files_in(folder):
    return [path for path in files_in(folder) if not path.name.startswith(".tmp-")]


# --- what is kept is what the encoder gave ---


@pytest.mark.parametrize("place", [DISK, MEMORY])
@pytest.mark.parametrize("flip_aug", [False, True])
def test_latents_are_those_of_the_encoder_bit_for_bit(folder, place, flip_aug):
    manifest = manifest_of(folder, subset="flip_aug = true" if flip_aug else "")
    cache, encoders, counts = fill_latents(manifest, place)
    assert counts == Counts(cached=0, encoded=5)
    assert encoders.pictures == (10 if flip_aug else 5)
    for item in manifest.items:
        for flip in {False, flip_aug}:
            pixels, _ = load_pixels(item, None, flip=flip)
            expected = Encoders().encode_pictures(pixels_to_tensor(pixels)[None])[0]
            latents, mask, edited = cache.get(item, flip=flip)
            assert torch.equal(latents, expected)
            assert mask is edited is None


@pytest.mark.parametrize("place", [DISK, MEMORY])
def test_text_features_are_those_of_the_encoder_bit_for_bit(folder, place):
    manifest = manifest_of(folder)
    cache, encoders, counts = fill_texts(manifest, place, prompt_of="You draw. {}".format)
    assert counts == Counts(cached=0, encoded=5)
    assert sorted(encoders.texts) == sorted(f"You draw. {text}" for text in CAPTIONS.values())
    for item in manifest.items:
        expected = tokens_of(Prompt(f"You draw. {item.text}"))
        assert torch.equal(cache.condition(item, item.text).tokens_LD, expected)


def test_a_pooled_vector_is_kept_too(folder):
    def encode(prompts):
        texts = [prompt.text for prompt in prompts]
        return [Condition(torch.ones(len(text), 2), torch.tensor([float(len(text))])) for text in texts]

    manifest = manifest_of(folder)
    cache = TextCache(DISK, "with pooled", max_variants=4)
    cache_texts(cache, manifest.items, lambda: encode, RUN)
    item = next(item for item in manifest.items if item.path.stem == "a")
    assert cache.condition(item, "a cat").pooled_D.tolist() == [5.0]


@pytest.mark.parametrize("place", [CachePlace(True), CachePlace(False)])
def test_bf16_is_the_rounded_output_at_half_the_size(folder, place):
    manifest = manifest_of(folder)
    exact, _, _ = fill_latents(manifest, MEMORY)
    rounded, _, _ = fill_latents(manifest, place)
    for item in manifest.items:
        latents = rounded.get(item, flip=False).picture
        assert latents.dtype == torch.bfloat16
        assert torch.equal(latents, exact.get(item, flip=False)[0].bfloat16())


@pytest.mark.parametrize("subset", ["alpha_mask = true", "alpha_mask = true\nflip_aug = true"])
def test_masks_are_kept_at_latent_size_and_mirrored_with_the_picture(tmp_path, subset):
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_picture(folder / "see_through.png", (90, 60), seed=1, alpha=True)
    (folder / "see_through.txt").write_text("glass")
    manifest = manifest_of(folder, subset=subset)
    cache, _, _ = fill_latents(manifest)
    (item,) = manifest.items
    for flip in {False, item.subset.images.flip_aug}:
        _, expected = load_pixels(item, None, flip=flip)
        latents, mask, _ = cache.get(item, flip=flip)
        assert mask.shape == latents.shape[1:]
        assert torch.equal(mask, mask_to_latent_size(expected, 8))
        assert 0.2 < mask.mean() < 0.8


def test_batches_are_of_one_bucket_and_no_larger_than_asked(folder):
    _, encoders, _ = fill_latents(manifest_of(folder), run=PassRun(batch_size=2))
    assert sorted(shape[0] for shape in encoders.picture_batches) == [1, 2, 2]  # three square, two wide


def test_the_largest_pictures_come_first(folder):
    write_picture(folder / "large.png", (200, 200), seed=7)
    (folder / "large.txt").write_text("large")
    manifest = manifest_of(folder, dataset="bucket_no_upscale = true", resolution=128)
    _, encoders, _ = fill_latents(manifest, run=PassRun(batch_size=1))
    areas = [shape[2] * shape[3] for shape in encoders.picture_batches]
    assert areas == sorted(areas, reverse=True)
    assert areas[0] > areas[-1]


def test_the_longest_texts_come_first_by_the_encoders_measure(folder):
    manifest = manifest_of(folder)
    _, encoders, _ = fill_texts(manifest)
    assert [len(text) for text in encoders.texts] == sorted(map(len, encoders.texts), reverse=True)
    by_words, cache = Encoders(), TextCache(MEMORY, "gemma 2", max_variants=16)
    cache_texts(cache, manifest.items, by_words.load_text_encoder, RUN, length=lambda t: t.count("a"))
    counts = [text.count("a") for text in by_words.texts]
    assert counts == sorted(counts, reverse=True)


def test_the_log_says_where_the_time_went(folder, caplog):
    logger = logging.getLogger("flow_scripts.caching")
    logger.addHandler(caplog.handler)
    caplog.set_level("INFO", logger="flow_scripts.caching")
    encoders = Encoders()

    def encode(pixels):
        time.sleep(0.05)
        return encoders.encode_pictures(pixels)

    def load_encoder():
        time.sleep(0.2)
        return encode

    counts = cache_latents(LatentCache(DISK, "ae"), manifest_of(folder).items, load_encoder, RUN)
    logger.removeHandler(caplog.handler)
    watch = counts.watch
    assert watch.seconds("load") >= 0.2
    assert watch.seconds("encode") >= 0.05 * len(encoders.picture_batches)
    parts = sum(watch.seconds(stage) for stage in ("load", "encode", "wait"))
    assert parts <= watch.seconds("all") + 1e-3, "they follow each other"
    assert watch.seconds("decode") > 0 < watch.seconds("write")
    busy = watch.seconds("all") - watch.seconds("load")
    assert f"latents: 5 encoded in {busy:.1f} s, {5 / busy:.2f} a second, after 0." in caplog.text
    assert f"{watch.seconds('encode') / busy:.1%} in the encoder, " in caplog.text


def test_decoding_encoding_and_writing_overlap(folder, monkeypatch):
    """Each step waits for one that only comes in time if they run at once."""
    decoded_later, encoded_later = threading.Event(), threading.Event()
    encoders, decoded, write = Encoders(), [], CacheStore.write

    def decode(item, key, *, flip):
        decoded.append(item)
        if len(decoded) == 3:
            decoded_later.set()
        return load_pixels(item, key, flip=flip)

    def encode(pixels):
        assert decoded_later.wait(10), "no picture was decoded while the first batch was encoded"
        if encoders.pictures:
            encoded_later.set()
        return encoders.encode_pictures(pixels)

    def write_late(store, *entry):
        assert encoded_later.wait(10), "nothing was encoded while the first entry was written"
        write(store, *entry)

    monkeypatch.setattr("library.training.caching.load_pixels", decode)
    monkeypatch.setattr(CacheStore, "write", write_late)
    cache = LatentCache(DISK, "ae")
    assert cache_latents(cache, manifest_of(folder).items, lambda: encode, PassRun(batch_size=1)).encoded == 5


# --- where entries are ---


def test_entries_lie_beside_the_pictures_unless_told_otherwise(folder, tmp_path):
    fill_latents(manifest_of(folder))
    assert len(files_in(folder / ".flow-cache" / "latents")) == 5
    fill_latents(manifest_of(folder), CachePlace(True, tmp_path / "by flag", "fp32"))
    assert len(files_in(tmp_path / "by flag" / "latents")) == 5
    of_subset = manifest_of(folder, subset=f"cache_directory = '{tmp_path / 'by subset'}'")
    fill_latents(of_subset, CachePlace(True, tmp_path / "another", "fp32"))
    assert len(files_in(tmp_path / "by subset" / "latents")) == 5
    assert not (tmp_path / "another").exists()


def test_in_memory_nothing_is_written(folder, tmp_path):
    manifest = manifest_of(folder)
    before = sorted(tmp_path.rglob("*"))
    fill_latents(manifest, MEMORY)
    fill_texts(manifest, MEMORY)
    assert sorted(tmp_path.rglob("*")) == before


def test_in_memory_entries_on_disk_are_used(folder):
    manifest = manifest_of(folder)
    on_disk, _, _ = fill_latents(manifest)
    files_in(folder)[0].write_bytes(b"damaged")
    files_in(folder)[1].unlink()
    before = files_in(folder)
    cache, encoders, counts = fill_latents(manifest, MEMORY)
    assert counts == Counts(cached=3, encoded=2)
    assert encoders.pictures == 2
    assert files_in(folder) == before
    for item in manifest.items:
        pixels, _ = load_pixels(item, None, flip=False)
        assert torch.equal(
            cache.get(item, flip=False)[0], Encoders().encode_pictures(pixels_to_tensor(pixels)[None])[0]
        )


def test_copies_are_encoded_once(folder):
    shutil.copy(folder / "a.png", folder / "copy.png")
    shutil.copy(folder / "a.txt", folder / "copy.txt")
    manifest = manifest_of(folder)
    assert fill_latents(manifest)[1].pictures == 5
    assert len(fill_texts(manifest)[1].texts) == 5


# --- exactly what is missing is encoded ---


def test_a_second_start_encodes_nothing_and_loads_no_model(folder):
    for fill in (fill_latents, fill_texts):
        fill(manifest_of(folder))
        _, encoders, counts = fill(manifest_of(folder))
        assert counts == Counts(cached=5, encoded=0)
        assert encoders.loads == 0


def change_a_picture(folder):
    with Image.open(folder / "b.png") as picture:
        pixels = np.array(picture)
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(folder / "b.png")


def add_a_picture(folder):
    write_picture(folder / "new.png", (64, 64), seed=99)
    (folder / "new.txt").write_text("a new one")


def change_a_caption(folder):
    (folder / "b.txt").write_text("two dogs, grass, sun")


def rename_a_picture(folder):
    for suffix in (".png", ".txt"):
        (folder / f"b{suffix}").rename(folder / f"renamed{suffix}")


def touch_all(folder):
    for path in folder.iterdir():
        os.utime(path) if path.is_file() else None


@pytest.mark.parametrize(
    "change, latents, texts",
    [
        (change_a_picture, 1, 0),
        (add_a_picture, 1, 1),
        (change_a_caption, 0, 1),
        (rename_a_picture, 0, 0),
        (touch_all, 0, 0),
    ],
)
def test_exactly_what_a_changed_file_touches_is_encoded_again(folder, change, latents, texts):
    fill_latents(manifest_of(folder))
    fill_texts(manifest_of(folder))
    change(folder)
    assert fill_latents(manifest_of(folder))[1].pictures == latents
    assert len(fill_texts(manifest_of(folder))[1].texts) == texts


@pytest.mark.parametrize(
    "manifest_options, fill_options, encoded",
    [
        ({"resolution": 96}, {}, 5),
        ({"subset": "resize_interpolation = 'nearest'"}, {}, 5),
        ({"subset": "alpha_mask = true"}, {}, 5),
        ({"subset": "flip_aug = true"}, {}, 10),
        ({"dataset": "bucket_no_upscale = true"}, {}, 0),
        ({"subset": "num_repeats = 3\nshuffle_caption = true"}, {}, 0),
        ({}, {"identity": "ae 2"}, 5),
        ({}, {"place": CachePlace(True, dtype="bf16")}, 5),
        ({}, {"run": PassRun(batch_size=1)}, 0),
    ],
)
def test_exactly_the_options_that_change_latents_ask_for_others(
    folder, manifest_options, fill_options, encoded
):
    fill_latents(manifest_of(folder))
    changed = fill_latents(manifest_of(folder, **manifest_options), **fill_options)
    assert changed[1].pictures == encoded
    _, encoders, counts = fill_latents(manifest_of(folder))
    assert encoders.loads == 0, "the entries of both settings lie side by side"
    assert counts.cached == 5


@pytest.mark.parametrize(
    "fill_options, encoded",
    [
        ({"identity": "gemma 2"}, 5),
        ({"prompt_of": "You draw. {}".format}, 5),
        ({"place": CachePlace(True, dtype="bf16")}, 5),
        ({"max_variants": 3}, 0),
    ],
)
def test_exactly_the_options_that_change_text_features_ask_for_others(folder, fill_options, encoded):
    fill_texts(manifest_of(folder))
    assert len(fill_texts(manifest_of(folder), **fill_options)[1].texts) == encoded
    assert fill_texts(manifest_of(folder))[1].loads == 0


def test_the_code_version_is_part_of_the_key(folder, monkeypatch):
    fill_latents(manifest_of(folder))
    fill_texts(manifest_of(folder))
    monkeypatch.setattr("library.data.cache_keys._LATENTS_VERSION", 1000)
    assert fill_latents(manifest_of(folder))[1].pictures == 5
    assert fill_texts(manifest_of(folder))[1].loads == 0
    monkeypatch.setattr("library.data.cache_keys._TEXTS_VERSION", 1000)
    assert len(fill_texts(manifest_of(folder))[1].texts) == 5


def test_damaged_entries_are_noticed_and_made_again(folder):
    manifest = manifest_of(folder)
    fill_latents(manifest)
    first, second, third, *_ = files_in(folder)
    first.write_bytes(first.read_bytes()[:-100])
    content = bytearray(second.read_bytes())
    content[-7] ^= 4
    second.write_bytes(content)
    third.write_bytes(b"")
    cache, encoders, counts = fill_latents(manifest)
    assert counts == Counts(cached=2, encoded=3)
    assert encoders.pictures == 3
    for item in manifest.items:
        cache.get(item, flip=False)


def test_without_the_check_an_entry_that_is_there_is_taken_until_it_is_read(folder):
    manifest = manifest_of(folder)
    fill_latents(manifest)
    damaged, gone, *_ = files_in(folder)
    content = bytearray(damaged.read_bytes())
    content[-7] ^= 4
    damaged.write_bytes(content)
    gone.unlink()
    cache, _, counts = fill_latents(manifest, run=PassRun(batch_size=2, check=False))
    assert counts == Counts(cached=4, encoded=1)
    with pytest.raises(DataError, match="was damaged"):
        for item in manifest.items:
            cache.get(item, flip=False)


# --- captions ---

CAPTION_OPTIONS = [
    "caption_prefix = 'photo of'\ncaption_suffix = 'in 4k'",
    "caption_dropout_rate = 0.5",
    "caption_dropout_every_n_epochs = 2",
    "enable_wildcard = true",
    "shuffle_caption = true\nkeep_tokens = 1",
    "shuffle_caption = true\nkeep_tokens_separator = '|||'\nsecondary_separator = ';;;'",
    "caption_tag_dropout_rate = 0.4",
    "token_warmup_min = 1\ntoken_warmup_step = 20\nshuffle_caption = true",
]


@pytest.mark.parametrize("options", CAPTION_OPTIONS)
@pytest.mark.parametrize("max_variants", [1, 5])
def test_every_caption_that_can_be_drawn_is_there(tmp_path, options, max_variants):
    captions = {
        "tags": "dog ||| red, blue;;;green, {big|small|tiny} house ||| end",
        "lines": "one line\nanother {a|b}\na third",
        "plain": "plain",
    }
    manifest = manifest_of(write_pictures(tmp_path / "pictures", captions), subset=options)
    cache, _, counts = fill_texts(manifest, MEMORY, max_variants=max_variants)
    drawn = set()
    for epoch in range(30):
        for item in manifest.items:
            place = {"seed": epoch % 3, "epoch": epoch, "repeat": 0, "step": epoch, "total_steps": 30}
            caption = draw_caption(item, **place, max_variants=max_variants)
            assert torch.equal(cache.condition(item, caption).tokens_LD, tokens_of(Prompt(caption)))
            drawn.add(caption)
    assert len(drawn) <= counts.encoded
    assert len(drawn) > 3 or max_variants == 1 or "prefix" in options


def test_sampled_captions_are_told_of(tmp_path, caplog):
    logger = logging.getLogger("flow_scripts.caching")
    logger.addHandler(caplog.handler)
    caplog.set_level("INFO", logger="flow_scripts.caching")
    captions = {"many": "a, b, c, d, e, f", "few": "a, b"}
    manifest = manifest_of(write_pictures(tmp_path / "p", captions), subset="shuffle_caption = true")
    fill_texts(manifest, MEMORY, max_variants=8)
    logger.removeHandler(caplog.handler)
    assert "1 of 2 captions reach --max_caption_variants 8" in caplog.text


# --- when things go wrong ---


def test_nan_in_latents_names_the_picture_and_is_never_kept(folder):
    manifest = manifest_of(folder)
    encoders, cache = Encoders(), LatentCache(DISK, "ae")

    def encode(pixels):
        latents = encoders.encode_pictures(pixels)
        latents[0, 1, 2, 3] = float("nan") if len(encoders.picture_batches) == 3 else 0.0
        return latents

    with pytest.raises(NonFiniteError, match=r"pictures/\w\.png"):
        cache_latents(cache, manifest.items, lambda: encode, PassRun(batch_size=1))
    assert len(files_in(folder)) <= 2
    assert all(torch.isfinite(load_file(path)["latents"]).all() for path in files_in(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_infinity_in_text_features_names_the_caption(folder, value):
    def encode(prompts):
        return [Condition(torch.full((3, 2), value if "dogs" in p.text else 1.0)) for p in prompts]

    cache = TextCache(MEMORY, "gemma", max_variants=1)
    with pytest.raises(NonFiniteError, match="two dogs, grass"):
        cache_texts(cache, manifest_of(folder).items, lambda: encode, RUN)


def test_large_values_are_not_taken_for_infinite(folder):
    cache = LatentCache(CachePlace(False), "ae")
    cache_latents(cache, manifest_of(folder).items, lambda: lambda p: p[:, :, ::8, ::8] * 1e38, RUN)


def test_a_picture_that_goes_bad_during_the_pass_is_named(folder):
    manifest = manifest_of(folder)
    (folder / "d.png").write_bytes(b"gone bad")
    with pytest.raises(DataError, match=r"d\.png"):
        fill_latents(manifest)


def test_a_folder_that_cannot_be_written_to_is_named(folder):
    (folder / ".flow-cache").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"\.flow-cache"):
        fill_latents(manifest_of(folder))


def test_a_pass_that_dies_at_any_point_goes_on_where_it_was(folder):
    manifest = manifest_of(folder)
    for survives in range(5):
        shutil.rmtree(folder / ".flow-cache", ignore_errors=True)
        first = Encoders()

        def encode(pixels, first=first, survives=survives):
            if first.pictures == survives:
                raise KeyboardInterrupt
            return first.encode_pictures(pixels)

        with pytest.raises(KeyboardInterrupt):
            cache_latents(LatentCache(DISK, "ae"), manifest.items, lambda e=encode: e, PassRun(batch_size=1))
        kept = len(files_in(folder))
        _, encoders, counts = fill_latents(manifest, identity="ae")
        assert counts == Counts(cached=kept, encoded=5 - kept)
        assert encoders.pictures == 5 - kept


# --- several processes ---


@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_share_the_work_out(folder, world):
    manifest = manifest_of(folder, subset="caption_prefix = 'x'")
    meetings = []
    for fill, done in ((fill_latents, lambda e: e.pictures), (fill_texts, lambda e: len(e.texts))):
        parts = []
        for rank in range(world):
            run = PassRun(2, rank, world, barrier=lambda: meetings.append("here"))
            _, encoders, counts = fill(manifest, run=run)
            assert counts.encoded == done(encoders)
            parts.append(counts.encoded)
        assert sum(parts) == 5
        assert max(parts) - min(parts) <= 1
    assert len(meetings) == 2 * world
    for rank in range(world):
        cache, encoders, _ = fill_latents(manifest, run=PassRun(2, rank, world))
        assert encoders.loads == 0
        for item in manifest.items:
            cache.get(item, flip=False)


class Meeting:
    """Processes, as threads, that hand each other bytes."""

    def __init__(self, world):
        self.exchanges = 0
        self._barrier = threading.Barrier(world, timeout=30)
        self._parts = [b""] * world

    def exchange(self, rank):
        def hand_round(mine):
            self._parts[rank] = mine
            self._barrier.wait()
            parts = list(self._parts)
            if self._barrier.wait() == 0:
                self.exchanges += 1
            return parts

        return hand_round


def in_threads(world, work):
    """Run work(rank) in a thread for each rank; return the results."""
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(work, range(world)))


@pytest.mark.parametrize("world", [2, 3, 7])
def test_in_memory_each_process_makes_its_part_and_gets_the_others(folder, world, monkeypatch):
    monkeypatch.setattr(cache_pass, "SHARED_AT_ONCE", 2)
    write_picture(folder / "a.png", (64, 64), seed=0, alpha=True)
    manifest = manifest_of(folder, subset="flip_aug = true\nalpha_mask = true")
    exact, _, _ = fill_latents(manifest, MEMORY)
    exact_texts, _, _ = fill_texts(manifest, MEMORY)
    meeting = Meeting(world)

    def one_process(rank):
        run = PassRun(1, rank, world, exchange=meeting.exchange(rank))
        latents, texts = fill_latents(manifest, MEMORY, run=run), fill_texts(manifest, MEMORY, run=run)
        return latents, texts

    results = in_threads(world, one_process)
    for which in (0, 1):
        parts = [result[which][2].encoded for result in results]
        assert sum(parts) == 5 and max(parts) - min(parts) <= 1
    assert meeting.exchanges == 2 * math.ceil(math.ceil(5 / world) / 2)
    for (latents, _, _), (texts, _, _) in results:
        for item in manifest.items:
            for flip in (False, True):
                for ours, theirs in zip(
                    latents.get(item, flip=flip), exact.get(item, flip=flip), strict=True
                ):
                    assert theirs is None if ours is None else torch.equal(ours, theirs)
            tokens_LD = texts.condition(item, item.text).tokens_LD
            assert torch.equal(tokens_LD, exact_texts.condition(item, item.text).tokens_LD)
    assert not files_in(folder)


SLOW_PASS = """
    import sys, time
    from pathlib import Path
    from library.data.cached import CachePlace, LatentCache
    from library.training.caching import PassRun, cache_latents
    from tests.picture_sets import Encoders, manifest_of

    encoders = Encoders()
    def encode(pixels):
        time.sleep(0.01)
        return encoders.encode_pictures(pixels)
    cache = LatentCache(CachePlace(True, dtype="fp32"), "ae 1")
    manifest = manifest_of(Path(sys.argv[1]))
    print("begin", flush=True)
    cache_latents(cache, manifest.items, lambda: encode, PassRun(batch_size=1))
"""


def start_slow_pass(folder):
    command = [sys.executable, "-c", textwrap.dedent(SLOW_PASS), str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def many(tmp_path):
    return write_pictures(tmp_path / "many", {f"picture {n}": f"text {n}" for n in range(60)})


def test_two_processes_on_one_cache_tear_and_lose_nothing(many):
    processes = [start_slow_pass(many) for _ in range(2)]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    cache, encoders, counts = fill_latents(manifest_of(many))
    assert counts == Counts(cached=60, encoded=0)
    for item in manifest_of(many).items:
        pixels, _ = load_pixels(item, None, flip=False)
        expected = encoders.encode_pictures(pixels_to_tensor(pixels)[None])[0]
        assert torch.equal(cache.get(item, flip=False)[0], expected)


def test_a_killed_process_leaves_only_whole_entries(many):
    process = start_slow_pass(many)
    process.stdout.readline()
    while len(whole_files_in(many)) < 12:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = len(whole_files_in(many))
    assert 12 <= kept < 60
    _, encoders, counts = fill_latents(manifest_of(many))
    assert counts == Counts(cached=kept, encoded=60 - kept)
    assert encoders.pictures == 60 - kept
