"""Flags of scheduled sampling as both scripts read them; a switch that is on by default can be told off."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.core.errors import ConfigError
from library.options.config_file import config_text
from library.options.group import build_parser, parse_options
from library.options.rollout import RolloutOptions
from library.options.train import LuminaTrainOptions
from library.options.train_kandinsky5 import Kandinsky5TrainOptions

LUMINA = [
    "--pretrained_model_name_or_path=d",
    "--gemma2=g",
    "--ae=a",
    "--network_module=networks.lora_lumina",
]
KANDINSKY = [
    *("--dit=d", "--text_encoder_qwen=q", "--text_encoder_clip=c", "--vae=v"),
    "--network_module=networks.lora_kandinsky5",
]
FAMILIES = [(LuminaTrainOptions, LUMINA), (Kandinsky5TrainOptions, KANDINSKY)]
SWITCH = "--scheduled_sampling_reflexflow"


def parse(family, *words: str) -> RolloutOptions:
    options, needed = family
    return parse_options(options, [*needed, "--output_dir=out", "--train_data_dir=p", *words]).rollout


@pytest.mark.parametrize("family", FAMILIES, ids=["lumina", "kandinsky5"])
def test_both_scripts_have_them_and_they_are_off(family) -> None:
    assert not parse(family).on
    words = ("--scheduled_sampling_max_step_offset=4", "--scheduled_sampling_probability=0.5")
    assert parse(family, *words).on
    assert parse(family, *words).scheduled_sampling_reflexflow


@pytest.mark.parametrize(
    ("words", "on"),
    [
        ([], True),
        ([SWITCH], True),
        ([SWITCH, "false"], False),
        ([f"{SWITCH}=False"], False),
        ([f"{SWITCH}=true"], True),
    ],
)
def test_the_switch_on_the_command_line(words: list[str], on: bool) -> None:
    assert parse(FAMILIES[0], *words, "--seed=3").scheduled_sampling_reflexflow is on


@pytest.mark.parametrize("written", ["true", "false"])
@pytest.mark.parametrize("ending", ["toml", "json"])
def test_the_switch_in_a_file(tmp_path: Path, written: str, ending: str) -> None:
    """A file may also have the word that is the default, and the command line wins over it."""
    path = tmp_path / f"options.{ending}"
    name = SWITCH.removeprefix("--")
    path.write_text(f"{name} = {written}" if ending == "toml" else f'{{"{name}": {written}}}')
    given = parse(FAMILIES[0], f"--config_file={path}")
    assert given.scheduled_sampling_reflexflow is (written == "true")
    assert not parse(FAMILIES[0], f"--config_file={path}", f"{SWITCH}=false").scheduled_sampling_reflexflow


@pytest.mark.parametrize("words", [[], [f"{SWITCH}=false"]])
def test_a_written_configuration_gives_the_same_options(tmp_path: Path, words: list[str]) -> None:
    needed = [*LUMINA, "--output_dir=out", "--train_data_dir=p"]
    options = parse_options(LuminaTrainOptions, [*needed, *words, "--scheduled_sampling_start_step=3"])
    path = tmp_path / "again.toml"
    path.write_text(config_text(options))
    assert parse_options(LuminaTrainOptions, [f"--config_file={path}"]).rollout == options.rollout


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (f"{SWITCH}=maybe", "reflexflow.*'maybe' is neither true nor false"),
        ("--scheduled_sampling_sampler=heun", "invalid choice: 'heun'"),
        ("--scheduled_sampling_sampler=unipc", "cannot be used here: the model walks by Euler's method"),
        ("--scheduled_sampling_strategy=late", "invalid choice: 'late'"),
        ("--scheduled_sampling_max_step_offset=2.5", "invalid int value: '2.5'"),
        ("--scheduled_sampling_prob=0.5", "did you mean '--scheduled_sampling_prob"),
    ],
)
def test_mistakes(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(FAMILIES[0], word)


def test_the_help_says_what_the_switch_takes() -> None:
    assert "--scheduled_sampling_reflexflow [{true,false}]" in " ".join(
        build_parser(LuminaTrainOptions).format_help().split()
    )
