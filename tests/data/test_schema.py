"""Dataset configurations: what they mean, and that every mistake is told with its place and the way out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from library.core.errors import ConfigError
from library.data.buckets import bucket_sizes
from library.data.config_report import lines_of_toml
from library.data.config_tables import DatasetTable, SubsetKeys, SubsetTable
from library.data.items import CaptionOptions, ImageOptions
from library.data.schema import load_datasets
from library.options.dataset import DatasetOptions
from library.options.group import parse_options

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `a`, `b`, `masks` and a metadata file; configurations are written and read there."""
    for name in ("a", "b", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "meta.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(toml: str, tell=print, **options: object):
    Path("data.toml").write_text(toml, encoding="utf-8")
    return load_datasets(DatasetOptions(dataset_config=Path("data.toml"), **options), stride=16, tell=tell)


def one_subset(lines: str = "", dataset: str = "resolution = 512", **options: object):
    (dataset,) = load(f"[[datasets]]\n{dataset}\n[[datasets.subsets]]\nimage_dir = 'a'\n{lines}\n", **options)
    return dataset.subsets[0]


def mistakes(toml: str, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(toml, **options)
    return str(caught.value)


def test_the_lowest_level_wins_and_the_command_line_is_the_last_resort() -> None:
    first, second = load(
        """
        [general]
        resolution = 512
        keep_tokens = 1
        [[datasets]]
        batch_size = 4
        keep_tokens = 2
          [[datasets.subsets]]
          image_dir = 'a'
          [[datasets.subsets]]
          image_dir = 'b'
          keep_tokens = 3
        [[datasets]]
        resolution = [768, 512]
          [[datasets.subsets]]
          image_dir = 'a'
        """,
        shuffle_caption=True,
        train_batch_size=8,
        dataset_repeats=5,
        keep_tokens=9,
    )
    assert [s.captions.keep_tokens for s in first.subsets] == [2, 3]
    assert second.subsets[0].captions.keep_tokens == 1
    assert (first.batch_size, second.batch_size) == (4, 8)
    assert (first.buckets.resolution, second.buckets.resolution) == ((512, 512), (768, 512))
    assert all(s.captions.shuffle_caption and s.num_repeats == 5 for s in first.subsets)


def test_every_key_reaches_its_dataset() -> None:
    (dataset,) = load(
        """
        [general]
        enable_bucket = true
        bucket_reso_steps = 32
        min_bucket_reso = 128
        max_bucket_reso = 1024
        bucket_no_upscale = true
        validation_seed = 7
        network_multiplier = 1
        [[datasets]]
        resolution = "768,512"
        [[datasets.subsets]]
        image_dir = 'a'
        num_repeats = 2
        is_reg = false
        alpha_mask = true
        recursive = true
        class_tokens = "cat"
        cache_directory = "cache"
        cache_info = false
        validation_split = 1
        caption_extension = "txt"
        caption_prefix = "p"
        caption_suffix = "s"
        caption_separator = ";"
        shuffle_caption = true
        keep_tokens = 3
        keep_tokens_separator = "|||"
        secondary_separator = "%"
        enable_wildcard = true
        caption_dropout_rate = 0.1
        caption_dropout_every_n_epochs = 4
        caption_tag_dropout_rate = 1
        token_warmup_min = 2
        token_warmup_step = 100
        color_aug = true
        flip_aug = true
        random_crop = true
        resize_interpolation = "bicubic"
        custom_attributes = {}
        """
    )
    buckets, subset = dataset.buckets, dataset.subsets[0]
    assert (buckets.resolution, buckets.bucket_reso_steps, buckets.min_bucket_reso) == ((768, 512), 32, 128)
    assert buckets.enable_bucket and buckets.max_bucket_reso == 1024 and buckets.bucket_no_upscale
    assert dataset.validation_seed == 7 and dataset.network_multiplier == 1.0
    assert subset.captions == CaptionOptions(
        "p", "s", ";", True, 3, "|||", "%", True, 0.1, 4, 1.0, token_warmup_min=2, token_warmup_step=100.0
    )
    assert subset.images == ImageOptions(True, True, True, None, True, "bicubic")
    assert (subset.num_repeats, subset.recursive, subset.validation_split) == (2, True, 1.0)
    assert (subset.caption_extension, subset.class_tokens) == (".txt", "cat")
    assert subset.cache_directory == Path("cache")


def test_no_key_is_accepted_and_then_forgotten() -> None:
    """Each key of the tables is a field of something that is built from them."""
    from library.data.items import BucketOptions, Dataset, Subset

    built = (BucketOptions, Dataset, Subset, CaptionOptions, ImageOptions)
    known = {f.name for made in built for f in fields(made)}
    keys = DatasetTable.model_fields.keys() | SubsetTable.model_fields.keys() | SubsetKeys.model_fields.keys()
    assert keys - known == {"cache_info"}  # what it asks for is always done


def test_all_mistakes_are_told_with_line_path_and_the_nearest_name() -> None:
    told = mistakes(
        """[general]
resolutoin = 512
shuffle_caption = 1
[[datasets]]
batch_size = 0
  [[datasets.subsets]]
  image_dir = "a"
  num_repeat = 3
  resolution = 512
[[datasets]]
  [[datasets.subsets]]
  is_rge = true
  caption_dropout_rate = 1.5
  resize_interpolation = "lancos"
[genral]
"""
    )
    assert "data.toml has 9 mistakes" in told
    for line in (
        "line 2, general.resolutoin: unknown key; did you mean 'resolution'?",
        "line 3, general.shuffle_caption: must be true or false, not 1.",
        "line 5, datasets[0].batch_size: is 0; it must be 1 or more.",
        "line 8, datasets[0].subsets[0].num_repeat: unknown key; did you mean 'num_repeats'?",
        "line 9, datasets[0].subsets[0].resolution: belongs in [[datasets]] or [general], not here.",
        "line 12, datasets[1].subsets[0].is_rge: unknown key; did you mean 'is_reg'?",
        "line 13, datasets[1].subsets[0].caption_dropout_rate: is 1.5; it must be 1 or less.",
        "line 14, datasets[1].subsets[0].resize_interpolation: must be one of lanczos, ",
        "line 15, genral: unknown table; did you mean 'general'?",
    ):
        assert line in told


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (
            "resolution = 1000",
            ["line 2, datasets[0].resolution", "1000 is not divisible by 16", "992 or 1008"],
        ),
        ("resolution = [512, 8]", ["8 is not divisible by 16; the nearest is 16"]),
        ("resolution = [512]", ["must have 2 numbers"]),
        ("resolution = '5x5'", ["must be a number or [width, height], not '5x5'"]),
        ("resolution = 512.5", ["resolution"]),
        ("", ["datasets[0].resolution: is required here, in [general], or as --resolution"]),
        ("resolution = 512\nenable_bucket = true\nbucket_reso_steps = 24", ["24 is not divisible by 16"]),
        (
            "resolution = 512\nenable_bucket = true\nbucket_reso_steps = 1024",
            ["more than the resolution 512"],
        ),
        (
            "resolution = 512\nenable_bucket = true\nmin_bucket_reso = 640",
            ["640 is more than the resolution 512"],
        ),
        ("resolution = 512\nenable_bucket = true\nmax_bucket_reso = 256", ["less than the resolution 512"]),
        ("resolution = 512\nbatch_size = 1.5", ["must be a whole number, not 1.5"]),
        ("resolution = 512\nimage_dir = 'a'", ["belongs in [[datasets.subsets]], not here"]),
        ("resolution = 512\nvalidation_split = 2", ["it must be 1 or less"]),
        ("resolution = 512\nvalidation_count = -1", ["validation_count: is -1; it must be 0 or more"]),
        (
            "resolution = 512\nvalidation_count = 2\nvalidation_split = 0.1",
            ["line 3, datasets[0].validation_count: and validation_split cannot both say", "to 0"],
        ),
        (
            "resolution = 512\nvalidation = true",
            ["datasets: all have validation = true; add one to train on"],
        ),
        ("resolution = 512\nvalidation = 1", ["validation: must be true or false, not 1"]),
        (
            "resolution = 512\nvalidation = true\nvalidation_split = 0.2\nflip_aug = true",
            [
                "datasets[0].validation_split: has no effect in a dataset with validation = true; remove it",
                "datasets[0].flip_aug: has no effect",
            ],
        ),
    ],
)
def test_mistakes_of_a_dataset(dataset: str, words: list[str]) -> None:
    told = mistakes(f"[[datasets]]\n{dataset}\n[[datasets.subsets]]\nimage_dir = 'a'\n")
    assert all(word in told for word in words), told


@pytest.mark.parametrize(
    ("subset", "words"),
    [
        (
            "image_dir = 'nowhere'",
            ["line 4, datasets[0].subsets[0].image_dir: the folder nowhere does not exist"],
        ),
        ("image_dir = 'meta.json'", ["the folder meta.json is not a folder"]),
        ("num_repeats = 2", ["image_dir: is required"]),
        ("image_dir = 'a'\nvalidation = true", ["subsets[0].validation: belongs in [[datasets]], not here"]),
        ("image_dir = 'a'\nvalidation_count = 2", ["belongs in [[datasets]] or [general], not here"]),
        ("image_dir = 'a'\nnum_repeats = 0", ["is 0; it must be 1 or more"]),
        ("image_dir = 'a'\nnum_repeats = true", ["must be a whole number, not True"]),
        ("image_dir = 'a'\nface_crop_aug_range = [3.0, 1.0]", ["low <= high"]),
        ("image_dir = 'a'\nconditioning_data_dir = 'masks'", ["has no effect without --masked_loss"]),
        ("metadata_file = 'other.json'", ["the file other.json does not exist"]),
        ("metadata_file = 'a'", ["must end in .json or .jsonl"]),
        (
            "metadata_file = 'meta.json'\nis_reg = true",
            ["is_reg: has no effect in a subset with metadata_file"],
        ),
        ("metadata_file = 'meta.json'\nclass_tokens = 'x'", ["class_tokens: has no effect"]),
        ("image_dir = 'a'\nis_reg = true", ["only regularisation subsets"]),
        ("image_dir = 'a'\ncustom_attributes = {trigger = true}", ["nothing reads 'trigger'"]),
        (
            "image_dir = 'a'\n[[datasets.subsets]]\nimage_dir = './a'",
            ["already used by datasets[0].subsets[0]"],
        ),
        ("image_dir = 'a'\n[[datasets.subsets]]\nmetadata_file = 'meta.json'", ["kind finetuning"]),
    ],
)
def test_mistakes_of_a_subset(subset: str, words: list[str]) -> None:
    told = mistakes(f"[[datasets]]\nresolution = 512\n[[datasets.subsets]]\n{subset}\n")
    assert all(word in told for word in words), told


def test_a_dataset_for_validation() -> None:
    """It takes what [general] says about pictures and captions, but not what says how much is held out."""
    general = "[general]\nresolution = 512\nvalidation_count = 3\nvalidation_seed = 4\ncaption_prefix = 'x'\n"
    one = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n"
    other = "[[datasets]]\nvalidation = true\n[[datasets.subsets]]\nimage_dir = 'b'\n"
    trained, validated = load(general + one + other)
    assert (trained.validation, trained.validation_count, trained.validation_seed) == (False, 3, 4)
    assert (validated.validation, validated.validation_count, validated.validation_seed) == (True, 0, None)
    assert validated.subsets[0].captions.caption_prefix == "x"
    row = other.replace("image_dir = 'b'", "image_dir = 'b'\nnum_repeats = 3\nis_reg = true")
    told = mistakes(general + one + row)
    assert "datasets[1].subsets[0].num_repeats: has no effect in a dataset with validation = true" in told
    assert "datasets[1].subsets[0].is_reg: has no effect" in told
    told = mistakes(f"{general}validation = true\n{one}")
    assert "general.validation: belongs in [[datasets]], not here" in told


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("", ["at least one [[datasets]]"]),
        ("[datasets]\nresolution = 512", ["at least one [[datasets]]"]),
        ("[[datasets]]\nresolution = 512", ["datasets[0].subsets: is required"]),
        ("[[datasets]]\nresolution = 512\nsubsets = []", ["at least one [[datasets.subsets]]"]),
        ("datasets = [1]", ["must be a table of keys, not 1"]),
        ("[[datasets]\n", ["is not valid TOML"]),
    ],
)
def test_mistakes_of_the_file(toml: str, words: list[str]) -> None:
    told = mistakes(toml)
    assert all(word in told for word in words), told


def test_a_bad_default_of_the_command_line_is_told_by_its_flag() -> None:
    toml = "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'a'\n"
    assert "--caption_dropout_rate: is 3.0" in mistakes(toml, caption_dropout_rate=3.0)
    assert "--train_batch_size: is 0" in mistakes(toml, train_batch_size=0)


def test_kinds_are_told_apart() -> None:
    masked = one_subset("conditioning_data_dir = 'masks'", masked_loss=True)
    assert (masked.kind, masked.conditioning_data_dir) == ("conditioning", Path("masks"))
    fine = one_subset("metadata_file = 'meta.json'")
    assert (fine.kind, fine.metadata_file, fine.image_dir) == ("finetuning", Path("meta.json"), Path("a"))
    assert one_subset().kind == "dreambooth"


def test_masked_loss_without_any_mask_is_refused() -> None:
    toml = "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'a'\n"
    assert "no subset has masks" in mistakes(toml, masked_loss=True)
    assert one_subset("alpha_mask = true", masked_loss=True).images.alpha_mask


def test_face_crops_need_whole_pictures() -> None:
    assert one_subset("face_crop_aug_range = [1.0, 3.0]").images.face_crop_aug_range == (1.0, 3.0)
    told = mistakes(
        "[[datasets]]\nresolution = 512\nenable_bucket = true\n[[datasets.subsets]]\nimage_dir = 'a'\n"
        "face_crop_aug_range = [1.0, 3.0]\n"
    )
    assert "needs enable_bucket = false" in told


BUCKETS = "[[datasets]]\nenable_bucket = true\n"
SUBSET = "[[datasets.subsets]]\nimage_dir = 'a'\n"


@pytest.mark.parametrize(
    ("lines", "bounds", "told"),
    [
        ("min_bucket_reso = 100\nmax_bucket_reso = 1000", (64, 1024), ["min", "max"]),
        ("min_bucket_reso = 8", (64, None), ["min"]),
        ("min_bucket_reso = 128\nmax_bucket_reso = 1024", (128, 1024), []),
        ("bucket_reso_steps = 48", (240, None), []),
    ],
)
def test_bounds_of_buckets_are_rounded_outwards_to_steps(lines: str, bounds: tuple, told: list) -> None:
    notes: list[str] = []
    (dataset,) = load(f"{BUCKETS}resolution = 512\n{lines}\n{SUBSET}", tell=notes.append)
    assert (dataset.buckets.min_bucket_reso, dataset.buckets.max_bucket_reso) == bounds
    assert [note.split("_")[0] for note in notes] == [f"datasets[0].{bound}" for bound in told]
    if notes:
        assert f"becomes {bounds[0]}, a multiple of bucket_reso_steps 64" in notes[0]


def test_bounds_of_the_command_line_are_called_by_their_flags() -> None:
    notes: list[str] = []
    Path("b/1_x").mkdir()
    options = DatasetOptions(
        train_data_dir=Path("b"), resolution=(512, 512), enable_bucket=True, max_bucket_reso=1000
    )
    load_datasets(options, stride=16, tell=notes.append)
    assert notes == ["--max_bucket_reso: 1000 becomes 1024, a multiple of bucket_reso_steps 64"]


def test_with_buckets_only_the_area_of_the_resolution_counts() -> None:
    (dataset,) = load(f"{BUCKETS}resolution = [1000, 1000]\n{SUBSET}")
    sizes = bucket_sizes(dataset.buckets)
    assert (960, 960) in sizes and (960, 1024) in sizes
    assert all(side % 64 == 0 for size in sizes for side in size)
    assert all(width * height <= 1000 * 1000 for width, height in sizes)


def test_flags_that_the_configuration_always_overrules_are_told() -> None:
    def told(toml: str) -> set[str]:
        notes: list[str] = []
        given = {"resolution": (768, 768), "train_batch_size": 4, "caption_extension": ".txt"}
        load(toml, tell=notes.append, **given)
        assert all(note.endswith("has no effect: data.toml says it for all pictures") for note in notes)
        return {note.partition(" ")[0] for note in notes}

    one = "[[datasets]]\nresolution = 512\nbatch_size = 2\n" + SUBSET
    decided = {"--resolution", "--train_batch_size"}
    assert told(one) == decided
    assert told(one + "caption_extension = '.caption'\n") == decided | {"--caption_extension"}
    assert told("[general]\ncaption_extension = '.caption'\n" + one) == decided | {"--caption_extension"}
    assert told(one + "[[datasets]]\nbatch_size = 1\n" + SUBSET) == {"--train_batch_size"}
    assert told("[[datasets]]\n" + SUBSET) == set()


def test_the_smallest_bucket_follows_a_small_resolution() -> None:
    (small,) = load(
        "[[datasets]]\nresolution = 128\nenable_bucket = true\nbucket_reso_steps = 16\n"
        "[[datasets.subsets]]\nimage_dir = 'a'\n"
    )
    assert small.buckets.min_bucket_reso == 64
    (usual,) = load("[[datasets]]\nresolution = 1024\n[[datasets.subsets]]\nimage_dir = 'a'\n")
    assert usual.buckets.min_bucket_reso == 256


def test_the_same_folder_may_be_in_several_datasets() -> None:
    subset = "[[datasets.subsets]]\nimage_dir = 'a'\n"
    datasets = load(f"[[datasets]]\nresolution = 512\n{subset}[[datasets]]\nresolution = 768\n{subset}")
    assert [d.buckets.resolution for d in datasets] == [(512, 512), (768, 768)]


def test_json_is_read_as_well() -> None:
    content = {
        "datasets": [{"resolution": [512, 512], "subsets": [{"image_dir": "a", "class_tokens": None}]}]
    }
    Path("data.json").write_text(json.dumps(content))
    (dataset,) = load_datasets(DatasetOptions(dataset_config=Path("data.json")), stride=16)
    assert dataset.subsets[0].image_dir == Path("a")
    content["datasets"][0]["subsets"][0]["imagedir"] = "a"
    Path("data.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"data.json, datasets\[0\].subsets\[0\].imagedir: unknown key"):
        load_datasets(DatasetOptions(dataset_config=Path("data.json")), stride=16)


def test_a_list_of_data_backends_is_told_what_it_is() -> None:
    path = Path("multidatabackend.json")
    path.write_text('[{"id": "x", "instance_data_dir": "a"}, {"dataset_type": "text_embeds"}]')
    with pytest.raises(ConfigError) as caught:
        load_datasets(DatasetOptions(dataset_config=path), stride=16)
    assert "list of SimpleTuner's data backends" in str(caught.value)
    assert "docs/datasets.md" in str(caught.value)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="must hold a table of keys, not a list"):
        load_datasets(DatasetOptions(dataset_config=path), stride=16)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("image_directory", "image_dir"), ("control_directory", "conditioning_data_dir")],
)
def test_keys_of_other_trainers_are_answered_with_ours(theirs: str, ours: str) -> None:
    for place in ("", "[[datasets.subsets]]\n"):
        Path("d.toml").write_text(f"[[datasets]]\nresolution = 64\n{place}{theirs} = 'a'\n")
        with pytest.raises(ConfigError, match=f"{theirs}: unknown key; here it is called '{ours}', in"):
            load_datasets(DatasetOptions(dataset_config=Path("d.toml")), stride=16)


def test_folders_named_with_their_repeats() -> None:
    for name in ("train/10_red cat", "train/2_dog_of_mine", "train/notes", "reg/1_cat"):
        Path(name).mkdir(parents=True)
    options = DatasetOptions(train_data_dir=Path("train"), reg_data_dir=Path("reg"), resolution=(512, 512))
    (dataset,) = load_datasets(options, stride=16)
    found = [(str(s.image_dir), s.num_repeats, s.class_tokens, s.is_reg) for s in dataset.subsets]
    assert found == [
        (os.path.join("train", "10_red cat"), 10, "red cat", False),
        (os.path.join("train", "2_dog_of_mine"), 2, "dog_of_mine", False),
        (os.path.join("reg", "1_cat"), 1, "cat", True),
    ]


def test_folders_not_named_so_are_explained() -> None:
    (Path("a") / "x.png").touch()
    with pytest.raises(ConfigError, match="it holds pictures itself, so call it for example 10_a"):
        load_datasets(DatasetOptions(train_data_dir=Path("a"), resolution=(512, 512)), stride=16)
    with pytest.raises(ConfigError, match="Call it 1_a"):
        load_datasets(DatasetOptions(train_data_dir=Path("."), resolution=(512, 512)), stride=16)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_datasets(DatasetOptions(train_data_dir=Path("nowhere"), resolution=(512, 512)), stride=16)
    (Path("b") / "1_x").mkdir()
    with pytest.raises(ConfigError, match="--resolution: is required"):
        load_datasets(DatasetOptions(train_data_dir=Path("b")), stride=16)


def test_a_folder_not_named_so_beside_others_is_left_out() -> None:
    for name in ("b/1_x", "b/backup", "b/0_y", "b/notes"):
        Path(name).mkdir()
        (Path(name) / ("x.png" if name != "b/notes" else "x.txt")).touch()
    notes: list[str] = []
    options = DatasetOptions(train_data_dir=Path("b"), resolution=(512, 512))
    (dataset,) = load_datasets(options, stride=16, tell=notes.append)
    assert [subset.image_dir for subset in dataset.subsets] == [Path("b/1_x")]
    assert [note.split()[3] for note in notes] == [os.path.join("b", "0_y"), os.path.join("b", "backup")]
    assert notes[1].endswith("how often they are to be used, as 1_backup would: it is left out")


def test_masks_of_folder_mode_lie_in_folders_of_the_same_names() -> None:
    Path("b/1_x").mkdir()
    Path("masks/1_x").mkdir()
    options = DatasetOptions(
        train_data_dir=Path("b"), conditioning_data_dir=Path("masks"), masked_loss=True, resolution=(512, 512)
    )
    (dataset,) = load_datasets(options, stride=16)
    assert dataset.subsets[0].conditioning_data_dir == Path("masks/1_x")


def test_a_metadata_file_on_the_command_line() -> None:
    options = DatasetOptions(
        in_json=Path("meta.json"), train_data_dir=Path("a"), dataset_repeats=3, resolution=(512, 512)
    )
    (dataset,) = load_datasets(options, stride=16)
    subset = dataset.subsets[0]
    assert (subset.kind, subset.image_dir, subset.num_repeats) == ("finetuning", Path("a"), 3)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({}, "no dataset is given"),
        ({"in_json": Path("x"), "reg_data_dir": Path("a")}, "cannot go with --in_json"),
        ({"train_data_dir": Path("a"), "conditioning_data_dir": Path("b")}, "--masked_loss"),
    ],
)
def test_contradictions_of_the_command_line(given: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        load_datasets(DatasetOptions(**given), stride=16)


def test_the_command_line_reads_sizes_and_intervals() -> None:
    from dataclasses import make_dataclass

    script = make_dataclass("Script", [("dataset", DatasetOptions)], frozen=True)
    words = ["--train_data_dir=a", "--resolution", "768,512", "--face_crop_aug_range=1.5,3"]
    options = parse_options(script, words).dataset
    assert (options.resolution, options.face_crop_aug_range) == ((768, 512), (1.5, 3.0))
    assert parse_options(script, ["--train_data_dir=a", "--resolution=1024"]).dataset.resolution == (
        1024,
        1024,
    )
    with pytest.raises(ConfigError, match="--resolution"):
        parse_options(script, ["--train_data_dir=a", "--resolution=10x10"])


def test_lines_are_found_through_nested_arrays() -> None:
    lines = lines_of_toml(
        '[[datasets]]\n  [[datasets.subsets]]\n  [[datasets.subsets]]\n"a" = 1\n[[datasets]]\nb=2'
    )
    assert lines["datasets", 0, "subsets", 1, "a"] == 4
    assert lines["datasets", 1, "b"] == 6


def test_a_configuration_is_checked_without_torch() -> None:
    code = "import sys, library.data.schema, library.data.scan, library.data.plan, library.data.captions;"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_documentation_lists_every_key_and_no_other() -> None:
    table = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8").split("## Keys")[1].split("##")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    known = DatasetTable.model_fields.keys() - {"subsets"} | SubsetTable.model_fields.keys()
    assert listed == known


CONFIGS = sorted((ROOT / "dataset_configs").glob("*.toml"))


def test_there_are_sample_configurations() -> None:
    assert len(CONFIGS) >= 6


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_sample_configurations_load(config: Path) -> None:
    """Their folders are made here; everything else must be right as it stands."""
    import toml

    content = toml.loads(config.read_text(encoding="utf-8"))
    for subset in (row for dataset in content["datasets"] for row in dataset["subsets"]):
        for key in ("image_dir", "conditioning_data_dir"):
            if key in subset:
                Path(subset[key]).mkdir(parents=True, exist_ok=True)
        if "metadata_file" in subset:
            Path(subset["metadata_file"]).parent.mkdir(parents=True, exist_ok=True)
            Path(subset["metadata_file"]).write_text("{}")
    masked = "--masked_loss" in config.read_text(encoding="utf-8")
    options = DatasetOptions(dataset_config=config, masked_loss=masked)
    datasets = load_datasets(options, stride=16, edits=config.stem == "editing")
    assert len(datasets) == len(content["datasets"])
