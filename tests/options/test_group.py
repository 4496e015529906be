"""Options: one declaration for flags and config keys, the same words for a mistake in either."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from library.core.errors import ConfigError
from library.options.group import REQUIRED, OptionGroup, option, parse_options


@dataclass(frozen=True, kw_only=True)
class Fruit(OptionGroup):
    """Fruit."""

    weight: float = option(1.0, "in kg, 100% ripe")
    count: int = option(3, "how many")
    kind: str = option("apple", "which", choices=("apple", "pear"))
    washed: bool = option(False, "clean")
    sizes: tuple[int, ...] | None = option(None, "several", nargs="*")
    file: Path = option(REQUIRED, "a path")

    def __post_init__(self):
        if self.count < 1:
            raise ConfigError(f"--count is {self.count}; it must be 1 or more.")


@dataclass(frozen=True)
class Options:
    fruit: Fruit


def parse(*words):
    return parse_options(Options, list(words)).fruit


def test_defaults_and_types():
    fruit = parse("--file", "x", "--sizes", "1", "2", "--washed", "--weight=2")
    assert fruit == Fruit(weight=2.0, washed=True, sizes=(1, 2), file=Path("x"))


def test_command_line_beats_config_file_and_sections_are_flattened(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text('file = "x"\n[a]\ncount = 5\nweight = 3\nwashed = true\n[b]\nsizes = [4, 5]\n')
    fruit = parse("--config_file", str(config), "--count", "7")
    assert (fruit.count, fruit.weight, fruit.washed, fruit.sizes) == (7, 3.0, True, (4, 5))
    assert parse("--config_file", str(config.with_suffix(""))) == parse("--config_file", str(config))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--wieght", "2"], "unknown argument '--wieght'; did you mean '--weight'?"),
        (["--count", "many"], "argument --count: invalid int value: 'many'"),
        (["--kind", "plum"], "argument --kind: invalid choice: 'plum'"),
        (["--count", "0"], "--count is 0; it must be 1 or more."),
        (["--coun", "2"], "unknown argument '--coun'; did you mean '--count'?"),
    ],
)
def test_mistakes_on_the_command_line(words, message):
    with pytest.raises(ConfigError) as caught:
        parse("--file", "x", *words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("wieght = 2", "unknown key 'wieght'; did you mean 'weight'?"),
        ("count = 'many'", "argument --count: invalid int value: 'many'"),
        ("kind = 'plum'", "argument --kind: invalid choice: 'plum'"),
        ("count = 0", "--count is 0; it must be 1 or more."),
        ("count = true", "argument --count: expected one argument"),
        ("washed = 'true'", "run.toml: washed = 'true' must be true or false, without quotes."),
        ("washed = 2", "run.toml: washed = 2 must be true or false, without quotes."),
        ("count = [", "is not valid TOML"),
    ],
)
def test_mistakes_in_a_config_file(tmp_path, line, message):
    config = tmp_path / "run.toml"
    config.write_text('file = "x"\n' + line)
    with pytest.raises(ConfigError) as caught:
        parse("--config_file", str(config))
    assert message in str(caught.value)


@pytest.mark.parametrize(("value", "washed"), [("true", True), ("1", True), ("false", False), ("0", False)])
def test_a_switch_in_a_config_file_is_a_truth_or_kohya_ss_number_for_it(tmp_path, value, washed):
    config = tmp_path / "run.toml"
    config.write_text(f"file = 'x'\nwashed = {value}\n")
    assert parse(f"--config_file={config}").washed is washed


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.json", '{"--file": "x", "a": {"--count": 5}, "--washed": true}'),
        ("run.toml", '"--file" = "x"\n"--washed" = true\n[a]\n"--count" = 5\n'),
    ],
)
def test_keys_of_a_config_file_may_be_written_with_dashes(tmp_path, name, text):
    config = tmp_path / name
    config.write_text(text)
    assert parse(f"--config_file={config}") == Fruit(file=Path("x"), count=5, washed=True)
    config.write_text('{"--count": 5, "count": 5}')
    with pytest.raises(ConfigError, match="'count' is there twice"):
        parse(f"--config_file={config.rename(tmp_path / 'twice.json')}")


def test_all_unknown_keys_of_a_config_file_are_named_at_once(tmp_path):
    config = tmp_path / "run.json"
    config.write_text('{"wieght": 2, "count": 5, "--cuont": 2, "nothing": 1}')
    with pytest.raises(ConfigError) as caught:
        parse(f"--config_file={config}")
    assert str(caught.value).splitlines() == [
        f"{config} has 3 unknown keys:",
        "  'wieght'; did you mean 'weight'?",
        "  'cuont'; did you mean 'count'?",
        "  'nothing'.",
    ]


def test_missing_obligatory_option_is_named():
    with pytest.raises(ConfigError, match="missing: --file"):
        parse("--count", "2")


def test_a_script_that_uses_some_options_misses_the_obligatory_ones_that_it_reads():
    fruit = parse_options(Options, ["--count", "2"], in_part=True).fruit
    assert (fruit.count, fruit.weight) == (2, 1.0)
    with pytest.raises(ConfigError, match="missing: --file"):
        print(fruit.file)
    assert parse_options(Options, ["--file", "x"], in_part=True) == parse_options(Options, ["--file", "x"])
    with pytest.raises(ConfigError, match="--count is 0"):
        parse_options(Options, ["--count", "0"], in_part=True)
    with pytest.raises(AttributeError, match="peel"):
        print(fruit.peel)


def test_help_prints_percent_signs(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    assert "100% ripe (default: 1.0)" in capsys.readouterr().out
