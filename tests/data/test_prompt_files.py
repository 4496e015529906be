"""Prompt files and the options behind a prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.core.errors import ConfigError, DataError
from library.data.images import source_picture
from library.data.prompt_files import load_prompts, load_sample_prompts, next_request, parse_line, sources_of
from library.options.request import ImageRequest

DEFAULTS = ImageRequest(prompt="unused", negative_prompt="ugly", width=512, height=512)


def write(tmp_path: Path, name: str, content: str) -> Path:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


def test_every_option_is_read() -> None:
    line = "a fox --w 768 --h 1152 --s 20 --d 0 --l 4.5 --n blurry, low --ctr 0.5 --rcfg 0 --fs 3 --m 0.5,1"
    assert parse_line(line, DEFAULTS) == ImageRequest(
        prompt="a fox",
        negative_prompt="blurry, low",
        width=768,
        height=1152,
        steps=20,
        seed=0,
        guidance_scale=4.5,
        cfg_trunc_ratio=0.5,
        renorm_cfg=0.0,
        discrete_flow_shift=3.0,
        lora_multipliers=(0.5, 1.0),
    )


def test_what_a_line_does_not_set_is_the_default() -> None:
    assert parse_line("a fox --G 2", DEFAULTS) == replace(DEFAULTS, prompt="a fox", guidance_scale=2.0)


@pytest.mark.parametrize(
    "text",
    [
        "n scale model of a ship",
        "w 5",
        "d 42",
        "s",
        "l 3.5 litres",
        "a -- b",
        "well--known",
        "x -n y",
        "g 2 -",
    ],
)
def test_the_text_is_never_taken_for_an_option(text: str) -> None:
    assert parse_line(text, DEFAULTS) == replace(DEFAULTS, prompt=text)
    assert parse_line(f"{text} --w 64", DEFAULTS) == replace(DEFAULTS, prompt=text, width=64)


@given(
    text=st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=40).map(
        lambda t: t.replace("--", "—")
    ),
    seed=st.integers(0, 2**63 - 1),
    steps=st.integers(1, 1000),
)
def test_any_text_comes_back_whole(text: str, seed: int, steps: int) -> None:
    found = parse_line(f"{text} --d {seed} --s {steps}", DEFAULTS)
    assert (found.prompt, found.seed, found.steps) == (text.strip(), seed, steps)


def told(line: str) -> tuple[ImageRequest, list[str]]:
    sentences: list[str] = []
    return parse_line(line, DEFAULTS, sentences.append), sentences


def test_g_gives_way_to_l_as_in_sd_scripts() -> None:
    request, sentences = told("a fox --g 7 --l 4.5 --w 64")
    assert request == replace(DEFAULTS, prompt="a fox", guidance_scale=4.5, width=64)
    assert sentences == ["--g 7.0 has no effect: --l is given and wins"]
    assert told("a fox --g 7") == (replace(DEFAULTS, prompt="a fox", guidance_scale=7.0), [])


def test_a_side_is_rounded_down_as_in_sd_scripts() -> None:
    request, sentences = told("x --w 900 --h 1024")
    assert (request.width, request.height) == (896, 1024)
    assert sentences == ["the width 900 becomes 896, the next lower multiple of 16"]


@pytest.mark.parametrize("name", ["ddim", "euler_a", "k_dpm_2_a"])
def test_samplers_of_other_models_draw_with_euler_as_in_sd_scripts(name: str) -> None:
    request, (sentence,) = told(f"x --ss {name}")
    assert request.sampler == "euler" and name in sentence


def test_a_picture_for_a_controlnet_is_not_used_and_told(tmp_path: Path) -> None:
    assert told("x --cn pose.png --w 64") == (
        replace(DEFAULTS, prompt="x", width=64),
        ["--cn pose.png has no effect: there are no ControlNets here"],
    )
    sentences: list[str] = []
    path = write(tmp_path, "p.json", '[{"prompt": "a", "controlnet_image": "pose.png"}]')
    assert load_prompts(path, DEFAULTS, sentences.append) == [replace(DEFAULTS, prompt="a")]
    (sentence,) = sentences
    assert sentence.startswith(f"{path}, prompt 1: controlnet_image pose.png has no effect: ")


def test_what_is_told_names_the_place_in_the_file(tmp_path: Path) -> None:
    sentences: list[str] = []
    text = write(tmp_path, "p.txt", "# prompts\na\nb --w 90\n")
    load_sample_prompts(text, replace(DEFAULTS, seed=1), sentences.append)
    entries = [{"prompt": "a", "guidance_scale": 2, "scale": 1}]
    table = write(tmp_path, "p.json", json.dumps(entries))
    (request,) = load_sample_prompts(table, replace(DEFAULTS, seed=1), sentences.append)
    assert request.guidance_scale == 1.0
    assert sentences == [
        f"{text}, line 3: the width 90 becomes 80, the next lower multiple of 16",
        f"{table}, prompt 1: guidance_scale 2 has no effect: scale is given and wins",
    ]


def test_a_dash_clears_the_negative_prompt() -> None:
    assert parse_line("a fox --n -", DEFAULTS).negative_prompt == ""
    assert parse_line("a fox", DEFAULTS).negative_prompt == "ugly"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x --w wide", "'wide' is not a whole number"),
        ("x --w", "'' is not a whole number"),
        ("x --h 8", "the nearest are 16 and up"),
        ("x --s 0", "steps is 0"),
        ("x --d -1", "seed is -1"),
        ("x --l nan", "guidance_scale is nan"),
        ("x --fs 0", "must be above 0"),
        ("x --m 1,a", "numbers separated by commas"),
        ("x --rcgf 1", "did you mean 'rcfg'"),
        ("x --ar 16:9", "there is no option --ar"),
        ("x --ss dimm", "sampler 'dimm' is not one for flow models"),
        ("x --l 3 --L 4", "the guidance_scale is given twice"),
    ],
)
def test_mistakes_are_named(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_line(line, DEFAULTS)


def test_interactive_values_stay_but_seed_and_negative_prompt_go_back() -> None:
    start = replace(DEFAULTS, seed=None)
    first = next_request("a fox --w 256 --s 9 --d 5 --n -", start, start)
    assert (first.width, first.steps, first.seed, first.negative_prompt) == (256, 9, 5, "")
    second = next_request("a hen --h 128", first, start)
    assert second == replace(start, prompt="a hen", width=256, height=128, steps=9)
    third = next_request("--g 7", second, start)
    assert third == replace(second, guidance_scale=7.0)


def test_text_file(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "\ufeff# comment\na fox --w 256\n\n  # another\nun café\n--n rain\n")
    assert load_prompts(path, DEFAULTS) == [
        replace(DEFAULTS, prompt="a fox", width=256),
        replace(DEFAULTS, prompt="un café"),
        replace(DEFAULTS, prompt="", negative_prompt="rain"),
    ]


def test_json_may_give_prompts_names(tmp_path: Path) -> None:
    library = {"portrait": "a fox --s 3", "scale": {"prompt": "b", "width": 64}}
    assert load_prompts(write(tmp_path, "p.json", json.dumps(library)), DEFAULTS) == [
        replace(DEFAULTS, prompt="a fox", steps=3),
        replace(DEFAULTS, prompt="b", width=64),
    ]


def test_toml_subset_wins_over_the_table_above_it(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "p.toml",
        "[prompt]\nwidth = 256\nscale = 4\nseed = 1\n"
        '[[prompt.subset]]\nprompt = "n fox --w 64"\nwidth = 320\n'
        '[[prompt.subset]]\nprompt = "b"\nseed = 0\n',
    )
    shared = replace(DEFAULTS, guidance_scale=4.0)
    assert load_prompts(path, DEFAULTS) == [
        replace(shared, prompt="n fox --w 64", width=320, seed=1),
        replace(shared, prompt="b", width=256, seed=0),
    ]


def test_json_holds_lines_and_tables(tmp_path: Path) -> None:
    entries = ["a fox --s 3", {"prompt": "b", "sample_steps": 4, "cfg_trunc_ratio": 1, "negative_prompt": ""}]
    assert load_prompts(write(tmp_path, "p.json", json.dumps(entries)), DEFAULTS) == [
        replace(DEFAULTS, prompt="a fox", steps=3),
        replace(DEFAULTS, prompt="b", steps=4, cfg_trunc_ratio=1.0, negative_prompt=""),
    ]


def test_a_prompt_may_be_called_like_a_setting(tmp_path):
    file = write(tmp_path, "p.json", json.dumps({"seed": "a seed in the earth", "other": "b"}))
    assert [request.prompt for request in load_prompts(file, DEFAULTS)] == ["a seed in the earth", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "a\nb --w 7", r"p.txt, line 2: image width 7"),
        ("p.txt", "# nothing\n", "holds no prompt"),
        ("p.yaml", "a", "must end in .txt, .json or .toml"),
        ("p.json", '{"prompt": "a"}', "'prompt' is a setting of one prompt: put the table into a list"),
        ("p.json", '"a"', "must hold a list of prompts, not a str"),
        ("p.json", "{}", "holds no prompt"),
        ("p.json", '{"cat": "a", "dog": 3}', "prompt 'dog': a prompt is text or a table, not a int"),
        ("p.json", '["a", 3]', "prompt 2: a prompt is text or a table, not a int"),
        ("p.json", '[{"prompt": "a", "widht": 64}]', "prompt 1: unknown key 'widht'; did you mean 'width'"),
        ("p.json", '[{"prompt": "a", "width": true}]', "width = True is not a whole number"),
        ("p.json", '[{"prompt": "a", "seed": "1"}]', "seed = '1' is not a whole number"),
        ("p.json", '[{"width": 64}]', "there is no prompt in it"),
        ("p.json", "[", "line 1"),
        ("p.toml", "[prompt]\nwidth = 64\n", r"one \[\[prompt.subset\]\] for each"),
        ("p.toml", "prompt = [", "not valid TOML"),
    ],
)
def test_mistakes_in_files_are_placed(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_prompts(write(tmp_path, name, content), DEFAULTS)


def test_missing_and_misencoded_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.txt cannot be read"):
        load_prompts(tmp_path / "absent.txt", DEFAULTS)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_prompts(tmp_path / "latin.txt", DEFAULTS)


def test_sample_prompts_without_a_seed_are_numbered_from_the_runs(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "a\nb --d 0\nc\n")
    requests = load_sample_prompts(path, replace(DEFAULTS, seed=42))
    assert [r.seed for r in requests] == [42, 0, 44]
    with pytest.raises(ConfigError, match="--m weighs the LoRAs"):
        load_sample_prompts(write(tmp_path, "m.txt", "a --m 0.5"), replace(DEFAULTS, seed=42))


# --- pictures that are edited ---

TABLE = '[prompt]\nsource = "all.png"\n[[prompt.subset]]\nprompt = "a"\n[[prompt.subset]]\nprompt = "b"\n'


@pytest.mark.parametrize(
    ("name", "content", "sources"),
    [
        (
            "p.txt",
            "a --ci one two.png --s 3\nb\nc --ci /abs/x.png\nd --CI -",
            ["one two.png", "D", "/abs/x.png", None],
        ),
        (
            "p.json",
            '[{"prompt": "a", "control_image": "x.png"}, "b --ci y.png", "c"]',
            ["x.png", "y.png", "D"],
        ),
        ("p.json", '[{"prompt": "a", "control_image": "x.png", "source": "y.png"}]', ["y.png"]),
        ("p.toml", TABLE + 'control_image = "-"\n', ["all.png", None]),
        ("p.toml", TABLE + 'source = "own/b.png"\n', ["all.png", "own/b.png"]),
    ],
)
def test_sources_lie_beside_the_prompt_file(tmp_path: Path, name: str, content: str, sources: list) -> None:
    default = Path("elsewhere/default.png")  # of the command line: relative to the current folder
    requests = load_prompts(write(tmp_path, name, content), replace(DEFAULTS, source=default))
    expected = [default if s == "D" else None if s is None else tmp_path / s for s in sources]
    assert [request.source for request in requests] == expected


def test_a_typed_source_stays_until_it_is_taken_back() -> None:
    start = replace(DEFAULTS, prompt="")
    first = next_request("make it red --ci pictures/x.png", start, start)
    second = next_request("make it blue", first, start)
    assert (first.source, second.source) == (Path("pictures/x.png"),) * 2
    assert next_request("a cat --ci -", second, start).source is None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "a --ci", "line 1: --ci: '' is not the path of a picture"),
        ("p.json", '[{"prompt": "a", "source": ""}]', "prompt 1: source = '' is not the path of a picture"),
        ("p.json", '[{"prompt": "a", "source": 3}]', "source = 3 is not the path of a picture"),
        ("p.txt", "a --ci x.png --ci y.png", "the source is given twice"),
    ],
)
def test_mistakes_of_sources(tmp_path: Path, name: str, content: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_prompts(write(tmp_path, name, content), DEFAULTS)


def test_sources_are_cut_to_the_size_of_what_is_drawn(tmp_path: Path) -> None:
    Image.new("RGB", (90, 40)).save(tmp_path / "x.png")
    path = write(tmp_path, "p.txt", "a --ci x.png --w 32 --h 64\nb\n")
    requests = load_prompts(path, DEFAULTS)
    assert sources_of(requests, edits=True) == [source_picture(tmp_path / "x.png", (32, 64)), None]
    with pytest.raises(
        ConfigError, match=r"--ci .*x.png cannot be used: this model makes pictures from text"
    ):
        sources_of(requests, edits=False)
    assert sources_of(requests[1:], edits=False) == [None]
    (tmp_path / "x.png").unlink()
    with pytest.raises(DataError, match="x.png is not there"):
        sources_of(requests, edits=True)
