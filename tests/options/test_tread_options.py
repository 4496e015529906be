"""--tread_routes: read from words and files, and every mistake in it is a sentence."""

import json

import pytest

from library.core.errors import ConfigError
from library.options.config_file import config_text
from library.options.group import parse_options
from library.options.train import LuminaTrainOptions
from library.options.tread import Route, TreadOptions, resolved

WORDS = [
    *("--pretrained_model_name_or_path=a", "--gemma2=b", "--ae=c", "--output_dir=d", "--dataset_config=e"),
    "--network_module=networks.lora_lumina",
]


def tread(*words):
    return parse_options(LuminaTrainOptions, [*WORDS, *words]).tread


def fitted(*routes, blocks=50):
    return resolved(TreadOptions(tread_routes=routes).routes, blocks)


def test_routes_are_counted_from_the_start_and_sorted():
    assert fitted("2:-2:0.5") == (Route(2, 48, 0.5),)
    assert fitted("-10:-1:0.25", "0:0:.1", "5:39:0.5") == (
        Route(0, 0, 0.1),
        Route(5, 39, 0.5),
        Route(40, 49, 0.25),
    )
    assert fitted() == ()


@pytest.mark.parametrize(
    ("routes", "sentence"),
    [
        (["2:-2"], "--tread_routes '2:-2' is not a route: write start:end:share, such as 2:-2:0.5"),
        (["2:-2:half"], "'2:-2:half' is not a route"),
        (["2.5:-2:0.5"], "'2.5:-2:0.5' is not a route"),
        (["2:-2:0.5,4:5:0.1"], "is not a route"),
        (["2:-2:50"], "drops a share of 50 of the tokens; it must be above 0 and below 1"),
        (["2:-2:0"], "drops a share of 0 of"),
        (["2:-2:nan"], "drops a share of nan"),
        (["2:50:0.5"], "there is no block 50; this model has 50 that tokens can skip, 0 to 49"),
        (["-51:3:0.5"], "there is no block -51"),
        (["9:-48:0.5"], "--tread_routes 9:-48:0.5 ends at block 2, before it begins at block 9"),
        (["2:20:0.5", "-30:-2:0.3"], "2:20:0.5 and -30:-2:0.3 overlap: block 20 is in both"),
        (["7:9:0.5", "2:8:0.3"], "2:8:0.3 and 7:9:0.5 overlap: block 7"),
        (["3:4:0.5", "3:4:0.5"], "overlap"),
    ],
)
def test_a_mistake_is_a_sentence(routes, sentence):
    with pytest.raises(ConfigError) as caught:
        fitted(*routes)
    assert sentence in str(caught.value) and "tread_routes" in str(caught.value)


def test_words_of_the_command_line():
    assert tread("--tread_routes", "2:9:0.5", "-6:-2:0.3", "--tread_off_last=10%") == TreadOptions(
        tread_routes=("2:9:0.5", "-6:-2:0.3"), tread_off_last=0.1
    )
    assert tread("--tread_routes=-6:-2:0.3").routes == (Route(-6, -2, 0.3),)


def test_a_config_file_has_a_list(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("tread_routes = ['-6:-2:0.3', '2:9:0.5']\ntread_off_last = 20\n")
    read = tread(f"--config_file={path}")
    assert read.routes == (Route(-6, -2, 0.3), Route(2, 9, 0.5)) and read.steps_off(100) == 20
    again = tmp_path / "again.toml"
    again.write_text(config_text(parse_options(LuminaTrainOptions, [*WORDS, f"--config_file={path}"])))
    assert parse_options(LuminaTrainOptions, [f"--config_file={again}"]).tread == read
    path.write_text("tread_routes = '2:9:0.5'\n")
    assert tread(f"--config_file={path}").routes == (Route(2, 9, 0.5),)


def test_simpletuners_way_of_saying_it_is_answered_with_ours(tmp_path):
    route = {"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"tread_config": {"routes": [route]}}))
    with pytest.raises(ConfigError, match="--tread_routes start:end:selection_ratio, such as 2:-2:0.5"):
        tread(f"--config_file={path}")
    with pytest.raises(ConfigError, match="'--tread_config': write each route as --tread_routes"):
        tread("--tread_config=x")


@pytest.mark.parametrize(("off", "steps"), [(0, 0), (30, 30), (0.1, 100), (1.0, 1000), (5000, 1000)], ids=str)
def test_the_last_steps_have_all_tokens(off, steps):
    assert TreadOptions(tread_routes=("2:3:0.5",), tread_off_last=off).steps_off(1000) == steps


def test_flags_that_have_nothing_to_do_are_told():
    def told(*words):
        return parse_options(LuminaTrainOptions, [*WORDS, *words]).adjustments()

    assert "--tread_off_last has no effect: no token is dropped without --tread_routes" in told(
        "--tread_off_last=5"
    )
    assert any("--tread_keep_mask has no effect: masks are read" in s for s in told(
        "--tread_routes=2:3:0.5", "--tread_keep_mask"
    ))  # fmt: skip
    assert any("--tread_routes has no effect" in s for s in told(
        "--tread_routes=2:3:0.5", "--tread_off_last=100%"
    ))  # fmt: skip
    assert not any("tread" in s for s in told("--tread_routes=2:3:0.5", "--tread_off_last=10%"))
