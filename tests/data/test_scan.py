"""What is on the disk becomes a manifest, or one message that names everything that is wrong."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.core.errors import DataError, UserError
from library.core.hashing import HashLedger
from library.data import facts
from library.data.folders import pictures_in
from library.data.items import Manifest
from library.data.metadata_file import _contained
from library.data.scan import _deal, scan
from library.data.schema import load_datasets
from library.options.dataset import DatasetOptions


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(path: str, size: tuple[int, int] = (64, 64), colour: int = 0, caption: str | None = None) -> Path:
    """Write a picture; `colour` makes its content differ from others'."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour % 256, colour // 256, 7)).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return file


def look(config: str, *, skip: bool = False, **options: object) -> Manifest:
    head = "[general]\nresolution = 64\ncaption_extension = '.txt'\n"
    Path("data.toml").write_text(head + config, encoding="utf-8")
    datasets = load_datasets(DatasetOptions(dataset_config=Path("data.toml"), **options), stride=16)
    return scan(datasets, skip_bad_images=skip, ledger=HashLedger(Path("cache/hashes.json")))


def look_at(lines: str, **more: object) -> Manifest:
    """Scan one dataset of one subset."""
    return look(f"[[datasets]]\n[[datasets.subsets]]\n{lines}\n", **more)


def complaint(lines: str, **more: object) -> str:
    with pytest.raises(UserError) as caught:
        look_at(lines, **more)
    return str(caught.value)


def test_pictures_and_captions_are_found_in_the_order_of_their_names() -> None:
    picture("p/b.png", (64, 32), 1, "two\nlines\n")
    picture("p/a.JPG", (32, 64), 2, "one")
    picture("p/deeper/c.png", colour=3, caption="deep")
    Path("p/.hidden.png").write_bytes(b"")
    Path("p/notes.md").write_text("x")
    manifest = look_at("image_dir = 'p'\nnum_repeats = 3")
    assert [(i.index, i.path.name, i.size, i.text, i.repeats) for i in manifest.items] == [
        (0, "a.JPG", (32, 64), "one", 3),
        (1, "b.png", (64, 32), "two\nlines", 3),
    ]
    assert manifest.train == (0, 1) and manifest.validation == () and manifest.skipped == ()
    assert "Only the first line is used of the captions of 1 picture" in manifest.notes[0]
    assert len(look_at("image_dir = 'p'\nrecursive = true\nenable_wildcard = true").items) == 3


def test_sizes_are_those_of_the_upright_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Path("p").mkdir()
    Image.new("RGB", (80, 40)).save("p/x.jpg", exif=exif)
    (item,) = look_at("image_dir = 'p'\nclass_tokens = 'x'").items
    assert item.size == (40, 80) and item.geometry.resized == (64, 128)


def test_class_tokens_stand_in_for_missing_captions_only() -> None:
    picture("p/a.png", caption="written")
    picture("p/b.png", colour=1)
    assert [i.text for i in look_at("image_dir = 'p'\nclass_tokens = 'a cat'").items] == ["written", "a cat"]


def test_class_tokens_beside_a_caption_of_another_ending_are_warned_of_once() -> None:
    for name, caption in (("p/a", "written"), ("p/b", None), ("q/c", None), ("q/d", None)):
        picture(f"{name}.png", colour=ord(name[-1]), caption=caption)
    Path("p/b.caption").write_text("overlooked")
    Path("q/c.caption").write_text("overlooked")
    both = "image_dir = 'p'\nclass_tokens = 'x'\n[[datasets.subsets]]\nimage_dir = 'q'\nclass_tokens = 'y'"
    manifest = look_at(both)
    assert [item.text for item in manifest.items] == ["written", "x", "y", "y"]
    (told,) = manifest.warnings
    assert "the captions of 2 pictures" in told
    assert f"b.caption beside {Path('p/b.png')}" in told and "--caption_extension .caption" in told
    Path("p/a.caption").write_text("not missed")
    assert look_at("image_dir = 'p'\nclass_tokens = 'x'\ncaption_extension = '.caption'").warnings == ()


def test_pictures_without_captions_are_named_with_the_way_out() -> None:
    for name in "abc":
        picture(f"p/{name}.png", colour=ord(name))
    told = complaint("image_dir = 'p'")
    assert "3 pictures in p without a caption file (.txt): a.png, b.png, c.png" in told
    assert "class_tokens" in told
    Path("p/a.caption").write_text("x")
    assert 'set caption_extension = ".caption"' in complaint("image_dir = 'p'")
    for name in "abc":
        Path(f"p/{name}.txt").write_text("")
    assert [i.text for i in look_at("image_dir = 'p'").items] == ["", "", ""]


def test_everything_wrong_is_told_at_once() -> None:
    picture("p/good.png", caption="x")
    whole = picture("p/cut.jpg", (300, 300), caption="x").read_bytes()
    Path("p/cut.jpg").write_bytes(whole[: len(whole) // 2])
    Path("p/empty.png").touch()
    Path("p/empty.txt").write_text("x")
    picture("p/latin.png", colour=1)
    Path("p/latin.txt").write_bytes("café".encode("latin-1"))
    Path("p/silent.png").write_bytes(b"no picture")
    told = complaint("image_dir = 'p'")
    for words in (
        "p/cut.jpg cannot be decoded",
        "p/empty.png cannot be decoded: the file is empty",
        "p/latin.txt is not UTF-8 (byte 3 is 0xe9)",
        "without a caption file (.txt): silent.png",
        "p/silent.png cannot be decoded: it is not a picture",
        "--skip_bad_images",
    ):
        assert words in told
    assert "good.png" not in told


def test_bad_pictures_are_left_out_and_listed_if_asked() -> None:
    picture("p/good.png", caption="x")
    Path("p/empty.png").touch()
    Path("p/empty.txt").write_text("x")
    manifest = look_at("image_dir = 'p'", skip=True)
    assert [i.path.name for i in manifest.items] == ["good.png"]
    assert manifest.skipped == ("p/empty.png cannot be decoded: the file is empty.",)
    Path("p/good.png").write_bytes(b"")
    assert "p has no picture that can be used" in complaint("image_dir = 'p'", skip=True)


def test_a_folder_without_pictures_is_an_error() -> None:
    Path("p").mkdir()
    assert "p holds no pictures" in complaint("image_dir = 'p'")
    picture("p/deeper/x.png", caption="x")
    assert "set recursive = true" in complaint("image_dir = 'p'")


def test_a_folder_that_cannot_be_read_is_named() -> None:
    with pytest.raises(DataError, match="The folder gone cannot be read: no such file"):
        list(pictures_in(Path("gone"), recursive=True))


def test_too_small_pictures_count_as_bad() -> None:
    picture("p/a.png", (200, 200), caption="x")
    picture("p/b.png", (20, 20), caption="x")
    lines = "enable_bucket = true\nbucket_reso_steps = 16\nbucket_no_upscale = true\nmin_bucket_reso = 32"
    config = f"[[datasets]]\n{lines}\n[[datasets.subsets]]\nimage_dir = 'p'\n"
    with pytest.raises(DataError, match=r"p/b.png: it has 20 x 20 pixels.*min_bucket_reso is 32"):
        look(config)
    assert len(look(config, skip=True).items) == 1


def test_a_second_start_decodes_nothing_and_a_changed_picture_is_noticed(monkeypatch) -> None:
    for name in "abc":
        picture(f"p/{name}.png", colour=ord(name), caption=name)
    decoded = []
    read = facts.read_facts
    monkeypatch.setattr(facts, "read_facts", lambda path: decoded.append(path.name) or read(path))
    first = look_at("image_dir = 'p'")
    assert sorted(decoded) == ["a.png", "b.png", "c.png"]
    decoded.clear()
    assert look_at("image_dir = 'p'") == first and decoded == []
    picture("p/b.png", (32, 32), colour=99)
    again = look_at("image_dir = 'p'")
    assert decoded == ["b.png"] and again.items[1].size == (32, 32)
    assert again.items[1].digest != first.items[1].digest
    Path("cache/pictures.json").write_text('{"version": 1, "pictures": {"x": "damaged"')
    assert look_at("image_dir = 'p'") == again


def test_many_pictures_are_scanned_quickly_the_second_time() -> None:
    data = picture("p/0.bmp", (16, 16)).read_bytes()
    for number in range(2000):
        Path(f"p/{number}.bmp").write_bytes(data[:-3] + number.to_bytes(3, "big"))
        Path(f"p/{number}.txt").write_text("x")
    look_at("image_dir = 'p'")
    start = time.process_time()
    assert len(look_at("image_dir = 'p'").items) == 2000
    assert time.process_time() - start < 1.0  # 10,000 take about a second; the bound is 2 s for them


def masks(size: tuple[int, int] = (64, 64)) -> str:
    for name in "ab":
        picture(f"p/{name}.png", colour=ord(name), caption=name)
    picture("m/a.png", size, 200)
    picture("m/b.jpg", size, 100)
    return "image_dir = 'p'\nconditioning_data_dir = 'm'"


def test_masks_are_paired_by_name_and_change_the_digest() -> None:
    items = look_at(masks(), masked_loss=True).items
    assert [item.mask_path for item in items] == [Path("m/a.png"), Path("m/b.jpg")]
    picture("m/a.png", colour=10)
    again = look_at("image_dir = 'p'\nconditioning_data_dir = 'm'", masked_loss=True).items
    assert again[0].digest != items[0].digest and again[1].digest == items[1].digest


def test_missing_and_misshapen_masks_are_named() -> None:
    assert "The mask m/a.png has 32 x 32 pixels, its picture 64 x 64" in complaint(
        masks((32, 32)), masked_loss=True
    )
    os.remove("m/b.jpg")
    assert "1 picture in p without a mask of the same name in m: b.png" in complaint(
        masks_lines(), masked_loss=True
    )


def masks_lines() -> str:
    return "image_dir = 'p'\nconditioning_data_dir = 'm'"


def metadata(content: object, name: str = "meta.json") -> str:
    Path(name).write_text(json.dumps(content) if name.endswith(".json") else content, encoding="utf-8")
    return f"metadata_file = '{name}'\nimage_dir = 'p'"


def test_a_metadata_table_tells_pictures_captions_and_tags() -> None:
    picture("p/a.png")
    picture("p/sub/b.png", colour=1)
    lines = metadata(
        {
            "a.png": {"caption": "one\ntwo", "tags": "x, y", "image_size": [1, 2]},
            "sub/b": {"tags": "only tags"},
        }
    )
    manifest = look_at(lines)
    assert [(i.path, i.text) for i in manifest.items] == [
        (Path("p/a.png"), "one,x, y"),
        (Path("p/sub/b.png"), "only tags"),
    ]
    assert look_at(lines + "\nenable_wildcard = true").items[0].text == "one,x, y\ntwo,x, y"


def test_metadata_lines_and_absolute_paths() -> None:
    path = picture("p/a.png").resolve()
    row = json.dumps({"image_path": str(path), "caption": "c"})
    Path("meta.jsonl").write_text(row + "\n\n", encoding="utf-8")
    (item,) = look_at("metadata_file = 'meta.jsonl'").items
    assert (item.path, item.text) == (path, "c")
    assert look_at("metadata_file = 'meta.jsonl'\nimage_dir = 'p'").items[0].path == path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"gone.png": {"caption": "x"}}, "the picture p/gone.png does not exist"),
        ({"../secret.png": {"caption": "x"}}, "'../secret.png' lies outside of image_dir p"),
        ({"/etc/x.png": {"caption": "x"}}, "'/etc/x.png' lies outside of image_dir p"),
        ({"a.png": {"captoin": "x"}}, '1 picture in meta.json with neither "caption" nor "tags": a.png'),
        ({"a.png": "x"}, "an entry must be a table"),
        ({"a.png": {"caption": 3}}, "caption must be a text, not 3"),
        ({"a\0.png": {"caption": "x"}}, "is not a file name"),
        ([], "must hold a table"),
        ({}, "has no entries"),
    ],
)
def test_mistakes_of_metadata(content: object, words: str) -> None:
    picture("p/a.png")
    picture("secret.png")
    assert words in complaint(metadata(content))


def test_mistakes_of_metadata_lines() -> None:
    picture("p/a.png")
    assert "line 2: there is no 'image_path'" in complaint(metadata('{"image_path": "a.png"}\n{}', "m.jsonl"))
    assert "line 1: Expecting" in complaint(metadata("{", "m.jsonl"))
    (Path("m.jsonl")).write_text(json.dumps({"image_path": "a.png", "caption": "x"}))
    assert "is not an absolute path" in complaint("metadata_file = 'm.jsonl'")


@given(
    st.lists(st.sampled_from(["..", ".", "a", "/", "//", "~", "p", "etc"]) | st.text(max_size=3), max_size=6)
)
def test_no_name_in_metadata_leads_out_of_the_folder(parts: list[str]) -> None:
    name = "/".join(parts)
    for folder in (Path("/data/p"), Path("p")):
        try:
            path = _contained(folder, name)
        except ValueError:
            continue
        root = os.path.abspath(folder)
        assert os.path.commonpath([os.path.abspath(path), root]) == root


def test_one_picture_in_two_subsets_of_a_dataset_is_refused() -> None:
    picture("p/sub/a.png", caption="x")
    lines = "image_dir = 'p'\nrecursive = true\n[[datasets.subsets]]\nimage_dir = 'p/sub'"
    assert "p/sub/a.png is found twice in datasets[0]" in complaint(lines)


def test_two_resolutions_use_the_same_pictures() -> None:
    picture("p/a.png", caption="x")
    subset = "[[datasets.subsets]]\nimage_dir = 'p'\n"
    manifest = look(f"[[datasets]]\n{subset}[[datasets]]\nresolution = 32\n{subset}")
    assert [(i.dataset_index, i.geometry.bucket) for i in manifest.items] == [(0, (64, 64)), (1, (32, 32))]
    assert manifest.items[0].digest == manifest.items[1].digest


def test_validation_holds_out_by_content_over_names_copies_and_datasets() -> None:
    for number in range(30):
        picture(f"p/{number:02}.png", colour=number, caption="x")
    picture("q/copy.png", colour=4, caption="x")
    config = (
        "[[datasets]]\nvalidation_split = 0.3\n[[datasets.subsets]]\nimage_dir = 'p'\n"
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'q'\n"
    )
    manifest = look(config)
    held = {manifest.items[i].digest for i in manifest.validation}
    assert 0 < len(held) < 20
    assert sorted(manifest.train + manifest.validation) == list(range(31))
    assert not held & {manifest.items[i].digest for i in manifest.train}
    for path in list(Path("p").glob("*.png")):
        path.rename(path.with_name(f"n{path.name}"))
        path.with_suffix(".txt").rename(path.with_name(f"n{path.stem}.txt"))
    picture("p/new.png", colour=200, caption="x")
    again = look(config)
    assert held <= {again.items[i].digest for i in again.validation}


def test_a_subset_may_have_its_own_validation_split_and_the_seed_chooses() -> None:
    for number in range(40):
        picture(f"{'pq'[number % 2]}/{number}.png", colour=number, caption="x")
    lines = "image_dir = 'p'\nvalidation_split = 0.5\n[[datasets.subsets]]\nimage_dir = 'q'"
    one = look(f"[[datasets]]\n[[datasets.subsets]]\n{lines}\n")
    other = look(f"[[datasets]]\nvalidation_seed = 5\n[[datasets.subsets]]\n{lines}\n")
    assert {one.items[i].path.parent.name for i in one.validation} == {"p"}
    assert one.validation != other.validation


def test_a_dataset_for_validation_does_not_touch_the_numbers_of_the_others() -> None:
    """Wherever it stands: what training draws hangs on them."""
    for number in range(6):
        picture(f"{'pqv'[number // 2]}/{number}.png", colour=number, caption="x")
    one, other, held = (f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{name}'\n" for name in "pqv")
    held = held.replace("[[datasets]]", "[[datasets]]\nvalidation = true")
    plain = look(one + other)
    for config in (held + one + other, one + held + other, one + other + held):
        manifest = look(config)
        assert [manifest.items[index].path.name for index in manifest.validation] == ["4.png", "5.png"]
        assert manifest.items[: len(plain.items)] == plain.items
        assert manifest.train == plain.train and manifest.trained_datasets == plain.datasets
        assert [item.index for item in manifest.items] == list(range(6))
        assert all(manifest.datasets[item.dataset_index] == item.dataset for item in manifest.items)


def test_pictures_that_are_also_in_a_dataset_for_validation_are_not_trained_on() -> None:
    for number in range(4):
        picture(f"p/{number}.png", colour=number, caption="x")
    picture("v/again.png", colour=2, caption="y")
    config = "[[datasets]]\nvalidation = true\n[[datasets.subsets]]\nimage_dir = 'v'\n"
    manifest = look(config + "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'p'\nnum_repeats = 2\n")
    assert [manifest.items[index].path.name for index in manifest.train] == ["0.png", "1.png", "3.png"]
    assert [str(manifest.items[index].path) for index in manifest.validation] == ["v/again.png"]
    assert any("datasets[1] has copies" in note and "2.png" in note for note in manifest.notes)


def test_a_number_of_pictures_is_held_out() -> None:
    for number in range(8):
        picture(f"{'pq'[number % 2]}/{number}.png", colour=number, caption="x")
    subsets = "[[datasets.subsets]]\nimage_dir = 'p'\n[[datasets.subsets]]\nimage_dir = 'q'\n"
    assert len(look(f"[[datasets]]\nvalidation_count = 3\n{subsets}").validation) == 3
    assert len(look(f"[[datasets]]\n{subsets}", validation_count=5).validation) == 5
    with pytest.raises(UserError, match="validation_count of datasets.0. is 9, but it has only 8"):
        look(f"[[datasets]]\n{subsets}", validation_count=9)


def test_a_split_that_holds_out_all_is_refused() -> None:
    picture("p/a.png", caption="x")
    assert "holds out all pictures" in complaint("image_dir = 'p'\nvalidation_split = 1")


def regularised(pictures: int, repeats: int, regular: int, regular_repeats: int = 1) -> Manifest:
    for number in range(pictures):
        picture(f"p/{number}.png", colour=number, caption="x")
    for number in range(regular):
        picture(f"r/{number:02}.png", colour=1000 + number, caption="x")
    return look_at(
        f"image_dir = 'p'\nnum_repeats = {repeats}\n[[datasets.subsets]]\nimage_dir = 'r'\nis_reg = true\n"
        f"num_repeats = {regular_repeats}"
    )


@pytest.mark.parametrize(("regular", "regular_repeats"), [(1, 1), (4, 1), (4, 7), (30, 1)])
def test_there_are_as_many_regularisation_draws_as_others(regular: int, regular_repeats: int) -> None:
    manifest = regularised(5, 3, regular, regular_repeats)
    draws = Counter()
    for item in manifest.items:
        draws[item.subset.is_reg] += item.repeats
    assert draws == {False: 15, True: 15}
    shares = [item.repeats for item in manifest.items if item.subset.is_reg]
    assert max(shares) - min(shares) <= 1 and min(shares) >= 1
    assert [item.index for item in manifest.items] == list(manifest.train)


def test_unused_regularisation_pictures_are_told() -> None:
    (note,) = regularised(2, 1, 10).notes
    assert note.startswith("8 of 10 regularisation pictures of datasets[0] are not used")


@given(st.integers(0, 500), st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_dealing_is_complete_and_in_proportion(total: int, weights: list[int]) -> None:
    shares = _deal(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1


def test_options_without_anything_to_work_on_are_noted() -> None:
    picture("p/a.png", caption="x")
    assert "no picture of p has an alpha channel" in look_at("image_dir = 'p'\nalpha_mask = true").notes[0]
    assert "no file name of p" in look_at("image_dir = 'p'\nface_crop_aug_range = [1.0, 2.0]").notes[0]


def test_captions_of_face_crops_may_lack_the_numbers() -> None:
    picture("p/me_10_20_30_40.png")
    Path("p/me.txt").write_text("a face")
    (item,) = look_at("image_dir = 'p'\nface_crop_aug_range = [1.0, 2.0]").items
    assert item.text == "a face"
