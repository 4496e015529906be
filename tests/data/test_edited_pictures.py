"""Pictures that are edits of others: how pairs are found, cut, named in caches, and put into batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.core.errors import ConfigError, DataError, UserError
from library.core.hashing import HashLedger
from library.data.buckets import cover, source_geometry
from library.data.cache_keys import check_texts_cacheable, latents_key, text_key
from library.data.images import drawn_source, load_pixels, load_source, source_picture, source_variants
from library.data.items import Dataset, Manifest
from library.data.prompt import Prompt
from library.data.scan import scan, without_sources
from library.data.schema import load_datasets
from library.options.dataset import DatasetOptions
from library.training.state.identity import dataset_digest
from tests.data.test_cache_keys import item_with
from tests.picture_sets import write_picture

BUCKETS = "enable_bucket = true\nbucket_reso_steps = 16\nmin_bucket_reso = 16\n"
PAIRS = "image_dir = 'after'\nconditioning_data_dir = 'before'"


@pytest.fixture(autouse=True)
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three pairs: `b` has a source of another format and half the size, `c` one of other proportions."""
    monkeypatch.chdir(tmp_path)
    write("after/a.png", (64, 64), 1, caption="make it red")
    write("after/b.png", (96, 48), 2, caption="make it blue")
    write("after/c.png", (80, 80), 3, caption="make it square")
    write("before/a.png", (64, 64), 11)
    write("before/b.webp", (48, 24), 12)
    write("before/c.png", (90, 40), 13)
    return tmp_path


def write(path: str, size: tuple[int, int], seed: int, *, alpha: bool = False, caption: str = "") -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_picture(file, size, seed, alpha)
    if caption:
        file.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return file


def load(
    subset: str, *, dataset: str = BUCKETS, edits: bool = True, **options: object
) -> tuple[Dataset, ...]:
    Path("data.toml").write_text(
        f"[general]\ncaption_extension = '.txt'\n[[datasets]]\nresolution = 64\n{dataset}\n"
        f"[[datasets.subsets]]\n{subset}\n",
        encoding="utf-8",
    )
    named = DatasetOptions(dataset_config=Path("data.toml"), **options)
    return load_datasets(named, stride=16, edits=edits)


def look(subset: str = PAIRS, *, skip: bool = False, **more: object) -> Manifest:
    datasets = load(subset, **more)
    return scan(datasets, skip_bad_images=skip, ledger=HashLedger(Path("cache/hashes.json")))


def complaint(subset: str = PAIRS, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        look(subset, **options)
    return str(caught.value)


# --- what is a pair ---


def test_pairs_have_the_same_name_and_any_ending() -> None:
    manifest = look()
    assert [item.source.path for item in manifest.items] == [
        Path("before/a.png"),
        Path("before/b.webp"),
        Path("before/c.png"),
    ]
    assert all(item.mask_path is None and item.subset.kind == "dreambooth" for item in manifest.items)
    assert [item.source.size for item in manifest.items] == [(64, 64), (48, 24), (90, 40)]
    assert manifest.notes == ()


def test_for_a_model_that_does_not_edit_the_folder_has_masks() -> None:
    assert "has no effect without --masked_loss" in complaint(edits=False)
    write("before/b.png", (96, 48), 12)
    write("before/c.png", (80, 80), 13)
    items = look(edits=False, masked_loss=True).items
    assert all(item.source is None and item.mask_path for item in items)


def test_all_missing_sources_are_named_with_the_way_out() -> None:
    for name in ("a.png", "c.png"):
        Path("before", name).unlink()
    told = complaint()
    assert "2 pictures in after without a source picture of the same name in before: a.png, c.png" in told
    assert "without conditioning_data_dir" in told


def test_sources_that_no_picture_has_are_told() -> None:
    write("before/d.png", (16, 16), 14)
    write("before/a.jpg", (16, 16), 15)  # the one with the ending of its picture is taken
    manifest = look()
    assert manifest.items[0].source.path == Path("before/a.png")
    (note,) = manifest.notes
    assert "2 pictures in before are no picture's source and are not used: a.jpg, d.png" in note


def test_subfolders_are_paired_with_subfolders() -> None:
    write("after/deep/a.png", (64, 64), 4, caption="x")
    write("before/deep/a.jpg", (64, 64), 14)
    items = look(PAIRS + "\nrecursive = true").items
    assert [str(item.source.path) for item in items if item.path.stem == "a"] == [
        "before/a.png",
        "before/deep/a.jpg",
    ]
    Path("before/deep/a.jpg").unlink()
    assert "without a source picture of the same name in before: a.png" in complaint(
        PAIRS + "\nrecursive = true"
    )


def test_a_metadata_file_may_have_sources_too() -> None:
    write("after/deep/d.png", (64, 64), 4)
    write("before/deep/d.jpg", (64, 64), 14)
    absolute = str(Path("after/b.png").resolve())
    Path("meta.json").write_text(
        json.dumps({"a.png": {"caption": "x"}, "deep/d": {"caption": "y"}, absolute: {"caption": "z"}})
    )
    lines = "conditioning_data_dir = 'before'\nmetadata_file = 'meta.json'"
    items = look(lines + "\nimage_dir = 'after'").items
    assert [item.source.path.name for item in items] == ["a.png", "d.jpg", "b.webp"]
    assert "pairs pictures by where they lie in image_dir" in complaint(lines)


@pytest.mark.parametrize(
    ("subset", "words"),
    [
        ("image_dir = 'after'\nconditioning_data_dir = 'after/'", "is image_dir itself"),
        ("image_dir = '.'\nconditioning_data_dir = 'before'\nrecursive = true", "before lies in image_dir"),
        ("image_dir = 'after'\nconditioning_data_dir = 'nowhere'", "the folder nowhere does not exist"),
    ],
)
def test_mistakes_of_folders(subset: str, words: str) -> None:
    assert words in complaint(subset)


def test_masks_of_pictures_that_are_edits_are_their_alpha() -> None:
    assert "give one alpha_mask = true" in complaint(masked_loss=True)
    write("after/a.png", (64, 64), 1, alpha=True)
    item = look(PAIRS + "\nalpha_mask = true", masked_loss=True).items[0]
    assert item.source and load_pixels(item, None, flip=False)[1] is not None


def test_folders_on_the_command_line() -> None:
    write("sets/3_cat/a.png", (64, 64), 1)
    write("sources/3_cat/a.png", (64, 64), 2)
    write("reg/1_cat/r.png", (64, 64), 3)
    options = DatasetOptions(
        train_data_dir=Path("sets"),
        reg_data_dir=Path("reg"),
        conditioning_data_dir=Path("sources"),
        resolution=(64, 64),
    )
    datasets = load_datasets(options, stride=16, edits=True)
    items = scan(datasets, skip_bad_images=False, ledger=HashLedger(Path("h.json"))).items
    assert [(item.path.name, bool(item.source)) for item in items] == [("a.png", True), ("r.png", False)]
    with pytest.raises(ConfigError, match="no effect without --masked_loss"):
        load_datasets(options, stride=16)


def test_pictures_with_and_without_a_source_may_be_mixed_and_it_is_told() -> None:
    write("alone/d.png", (64, 64), 4, caption="a style")
    manifest = look(PAIRS + "\n[[datasets.subsets]]\nimage_dir = 'alone'")
    assert [bool(item.source) for item in manifest.items] == [True, True, True, False]
    (note,) = without_sources(manifest)
    assert "alone (datasets[0])" in note and "1 pictures are trained from their captions alone" in note


# --- odd sources ---


def test_sources_that_cannot_be_decoded_are_named_or_left_out_with_their_pictures() -> None:
    Path("before/a.png").write_bytes(Path("before/a.png").read_bytes()[:200])
    Path("before/c.png").write_bytes(b"")
    told = complaint()
    assert "before/a.png cannot be decoded" in told and "It is the source of after/a.png" in told
    assert "before/c.png cannot be decoded: the file is empty" in told
    manifest = look(skip=True)
    assert [item.path.name for item in manifest.items] == ["b.png"]
    assert len(manifest.skipped) == 2


def test_a_source_too_long_and_thin_counts_as_bad() -> None:
    Image.new("RGB", (4, 1000)).save("before/a.png")
    assert "before/a.png: it has 4 x 1000 pixels, and less than 1/50 would be left" in complaint()
    assert len(look(skip=True).items) == 2


def test_sources_are_read_like_pictures() -> None:
    """Upright, with transparency white, from any mode and size."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (24, 48), "red").save("before/b.webp", exif=exif)
    Image.new("RGBA", (640, 640), (0, 0, 0, 0)).save("before/a.png")
    Image.new("L", (1, 1), 77).save("before/c.png")
    by_name = {item.path.stem: item for item in look().items}
    assert by_name["b"].source.size == (48, 24)
    shown = {name: load_source(drawn_source(item, None, flip=False)) for name, item in by_name.items()}
    for name, pixels in shown.items():
        width, height = by_name[name].geometry.bucket
        assert pixels.shape == (height, width, 3) and pixels.dtype == np.uint8
    assert (shown["a"] == 255).all() and (shown["c"] == 77).all()
    assert shown["b"][..., 0].min() > 200 > 50 > shown["b"][..., 1].max()


def test_a_source_that_changes_its_size_while_running_is_named() -> None:
    source = drawn_source(look().items[0], None, flip=False)
    write("before/a.png", (32, 32), 1)
    with pytest.raises(DataError, match="before/a.png changed while the program was running"):
        load_source(source)


# --- where it is cut ---


SIDE = st.integers(1, 2000)


@given(SIDE, SIDE, st.sampled_from([(64, 64), (128, 64), (64, 256)]), st.fractions(1, 8))
def test_the_same_proportions_are_cut_alike(width: int, height: int, bucket: tuple, ratio) -> None:
    """One picture may be the other, made smaller and rounded in any way."""
    place = cover((width, height), bucket)
    smaller = (
        [max(1, int(side / ratio)) for side in (width, height)],
        [max(1, round(side / ratio)) for side in (width, height)],
    )
    for other in map(tuple, smaller):
        assert source_geometry(other, (width, height), place) == place
        assert source_geometry((width, height), other, cover(other, bucket)) == cover(other, bucket)


@pytest.mark.parametrize(
    ("source", "same"),
    [((1024, 768), True), ((1024, 767), True), ((1024, 766), False), ((1023, 768), True), ((512, 383), True)]
    + [((512, 382), False), ((1025, 768), True), ((4096, 3072), True), ((4096, 3066), False)],
)
def test_proportions_are_the_same_up_to_one_pixel_of_the_smaller_picture(source: tuple, same: bool) -> None:
    place = cover((1024, 768), (1024, 1024))
    assert (source_geometry(source, (1024, 768), place) == place) == same


@given(SIDE, SIDE, SIDE, SIDE, st.sampled_from([(64, 64), (128, 64), (64, 256)]))
def test_a_source_covers_the_bucket(width: int, height: int, w: int, h: int, bucket: tuple) -> None:
    place = cover((width, height), bucket)
    try:
        own = source_geometry((w, h), (width, height), place)
    except DataError:
        assert max(w * bucket[1] / (h * bucket[0]), h * bucket[0] / (w * bucket[1])) > 40
        return
    assert own.bucket == bucket and all(r >= b for r, b in zip(own.resized, bucket, strict=True))
    assert own in (place, cover((w, h), bucket))


@pytest.mark.parametrize(
    "options",
    ["", "random_crop = true", "color_aug = true", "face_crop_aug_range = [1.0, 2.0]", "flip_aug = true"],
)
def test_a_source_is_augmented_exactly_like_its_picture(options: str) -> None:
    """Of a pair of equal pictures, both show the same pixels in every draw."""
    name = "d_40_30_20_20.png"
    for folder in ("after", "before"):
        write(f"{folder}/{name}", (100, 70), 5, caption="x")
    dataset = "" if "face" in options else BUCKETS
    item = next(i for i in look(f"{PAIRS}\n{options}", dataset=dataset).items if i.path.name == name)
    views = set()
    for epoch in range(12):
        key, flip = (7, epoch, item.index, 0), epoch % 2 == 1
        pixels, _ = load_pixels(item, key, flip=flip)
        source = load_source(drawn_source(item, key, flip=flip))
        assert np.array_equal(source, pixels)
        views.add(source.tobytes())
    assert len(views) > 2 or options in ("", "flip_aug = true")


def test_a_smaller_source_shows_the_same_part_of_the_picture() -> None:
    """A soft picture and its half: after resizing and cutting, hardly anything differs."""
    y, x = np.mgrid[0:120, 0:200]
    soft = np.stack([x * 255 / 200, y * 255 / 120, (x + y) * 255 / 320], axis=-1).astype(np.uint8)
    Image.fromarray(soft).save("after/a.png")
    Image.fromarray(soft).resize((100, 60), Image.Resampling.BOX).save("before/a.png")
    item = look(PAIRS + "\nrandom_crop = true\nresize_interpolation = 'bilinear'").items[0]
    for epoch in range(4):
        key = (1, epoch, item.index, 0)
        pixels, _ = load_pixels(item, key, flip=False)
        source = load_source(drawn_source(item, key, flip=False))
        assert np.abs(pixels.astype(int) - source).max() <= 6


def test_a_source_of_other_proportions_is_cut_in_the_middle() -> None:
    item = look(PAIRS + "\nrandom_crop = true").items[2]
    places = {drawn_source(item, (1, epoch, 0, 0), flip=False).geometry for epoch in range(5)}
    assert places == {cover((90, 40), item.geometry.bucket)}


# --- without the source ---


def test_a_share_of_the_draws_goes_without() -> None:
    manifest = look()
    drawn = [
        drawn_source(item, (3, epoch, item.index, 0), flip=False, dropout=0.3) is None
        for item in manifest.items
        for epoch in range(400)
    ]
    assert 0.25 < sum(drawn) / len(drawn) < 0.35
    item = manifest.items[0]
    assert drawn_source(item, (3, 0, 0, 0), flip=False, dropout=1.0) is None
    assert drawn_source(item, None, flip=False, dropout=1.0) is not None, "held-out pictures never"


def test_the_variants_are_what_draws_show() -> None:
    item = look(PAIRS + "\nflip_aug = true").items[0]
    for dropout in (0.0, 0.5):
        drawn = {
            drawn_source(item, (1, epoch, 0, 0), flip=flip, dropout=dropout)
            for epoch in range(30)
            for flip in (False, True)
        }
        assert drawn == set(source_variants(item, dropout)), dropout
    held_out = replace(item, held_out=True)
    assert source_variants(held_out, 0.5) == (drawn_source(item, None, flip=False),)
    assert source_variants(replace(item, source=None), 0.5) == (None,)


# --- what it is known by ---


def test_entries_of_pictures_and_texts_without_a_source_keep_their_keys() -> None:
    """Computed before there were sources: caches of that time stay valid."""
    kept = "779571750fefe88725e29e76aba380f3a0dc4aa6c6e5cc5e38b558561438910a"
    assert text_key(Prompt("a cat"), "gemma", "bf16") == kept
    kept = "6d7ca23f0cd2075ece4b9e16f9ec10f5cbb7a3ced8486a25e7c355c22aae8045"
    assert latents_key(item_with(), "ae", "bf16") == kept


def test_all_that_decides_the_sources_pixels_is_in_the_keys() -> None:
    item = look(PAIRS + "\nflip_aug = true").items[0]
    source = drawn_source(item, None, flip=False)
    changed = [
        None,
        replace(source, digest="another"),
        replace(source, geometry=replace(source.geometry, crop=(1, 0))),
        replace(source, interpolation="area"),
        replace(source, flipped=True),
        replace(source, colours=(1, 2, 3, 4)),
    ]
    prompts = [Prompt("x", each) for each in [source, *changed]]
    assert len({text_key(prompt, "qwen", "bf16") for prompt in prompts}) == len(prompts)
    moved = replace(source, path=Path("elsewhere.png"), size=None)
    assert text_key(Prompt("x", moved), "qwen", "bf16") == text_key(Prompt("x", source), "qwen", "bf16")
    others = [
        replace(item, source=None),
        replace(item, source=replace(item.source, digest="another")),
        replace(item, source=replace(item.source, geometry=cover((64, 65), (64, 64)))),
    ]
    keys = {latents_key(each, "ae", "bf16") for each in [item, *others]}
    assert len(keys) == 4


def test_a_changed_source_is_a_changed_dataset() -> None:
    before = look()
    assert dataset_digest(look()) == dataset_digest(before)
    write("before/b.webp", (48, 24), 99)
    after = look()
    assert [one.digest == other.digest for one, other in zip(before.items, after.items, strict=True)] == [
        True
    ] * 3
    assert dataset_digest(after) != dataset_digest(before)
    alone = look("image_dir = 'after'")
    assert dataset_digest(alone) not in (dataset_digest(before), dataset_digest(after))


@pytest.mark.parametrize("option", ["random_crop = true", "color_aug = true"])
def test_texts_cannot_be_cached_with_sources_that_are_drawn_anew(option: str) -> None:
    with pytest.raises(
        ConfigError, match=r"of after cannot be used with --cache_text_encoder_outputs.*before"
    ):
        check_texts_cacheable(load(f"{PAIRS}\n{option}"))
    check_texts_cacheable(load(f"image_dir = 'after'\n{option}"))
    check_texts_cacheable(load(f"{PAIRS}\nflip_aug = true"))


# --- the source of a sample picture ---


def test_a_source_for_a_size_is_cut_in_the_middle(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (40, 1, 3))
    Image.fromarray(ramp).save("wide.png")
    source = source_picture(Path("wide.png"), (40, 40))
    pixels = load_source(source)
    assert pixels.shape == (40, 40, 3)
    assert np.array_equal(pixels, ramp[:, 40:80])
    other = source_picture(Path("wide.png"), (32, 64))
    assert source.identity != other.identity and other.geometry == cover((120, 40), (32, 64))
    assert source_picture(Path("wide.png"), (40, 40)) == source


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.png", None, "gone.png is not there"),
        ("text.png", b"words", "text.png cannot be decoded: it is not a picture"),
        ("thin.png", "thin", "thin.png: it has 1 x 500 pixels"),
        ("folder", "folder", "folder cannot be decoded"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(name: str, content: object, words: str) -> None:
    if content == "thin":
        Image.new("L", (1, 500)).save(name)
    elif content == "folder":
        Path(name).mkdir()
    elif content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        source_picture(Path(name), (64, 64))
