"""How long the texts of a run are, which its memory is planned for."""

import logging
import re

import pytest
from PIL import Image

from library.data.captions import caption_variants
from library.data.prompt import Prompt
from library.options.group import parse_options
from library.options.train import LuminaTrainOptions
from library.training.context import RunContext
from library.training.look.budget import planned
from library.training.look.dry_run import Rehearsal
from library.training.look.texts import longest_text
from library.training.prepare import prepare
from lumina_train_network import LuminaTrainer

CAPTIONS = ("a cup", "a {red|very light blue} cup, on a table, beside a spoon")
CACHED = "--cache_text_encoder_outputs"


@pytest.fixture
def command(nano, tmp_path):
    photos = tmp_path / "data" / "1_thing"
    photos.mkdir(parents=True)
    for number, caption in enumerate(CAPTIONS):
        Image.new("RGB", (64, 64)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(caption)
    return [
        *(f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2={nano.gemma2}", f"--ae={nano.ae}"),
        *(f"--train_data_dir={photos.parent}", "--caption_extension=.txt", "--resolution=64", "--seed=1"),
        *("--network_module=networks.lora_lumina", "--network_dim=4", "--max_train_steps=2"),
        *(f"--output_dir={tmp_path / 'out'}", "--output_name=it"),
    ]


def made(command, *words):
    trainer = LuminaTrainer(parse_options(LuminaTrainOptions, [*command, *words]))
    return trainer, prepare(trainer)


def most_tokens(trainer, texts):
    return max(trainer.count_tokens(Prompt(trainer.format_prompt(text)))[0] for text in texts)


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        ([], CAPTIONS),
        ([CACHED], CAPTIONS),
        (["--enable_wildcard"], ("a cup", "a very light blue cup, on a table, beside a spoon")),
        ([CACHED, "--enable_wildcard"], ("a very light blue cup, on a table, beside a spoon",)),
        ([CACHED, "--caption_dropout_rate=0.5"], CAPTIONS),
    ],
)
def test_it_is_the_longest_that_can_be_drawn(command, words, texts):
    trainer, prepared = made(command, *words)
    assert longest_text(trainer, prepared.manifest) == most_tokens(trainer, texts)


def test_captions_drawn_anew_can_be_of_any_length(command):
    for option in ("--shuffle_caption", "--caption_tag_dropout_rate=0.1", "--token_warmup_step=10"):
        trainer, prepared = made(command, option)
        assert longest_text(trainer, prepared.manifest) is None


def test_a_dry_run_plans_for_what_it_cannot_know(command):
    reports = {}
    for words in ("", "--shuffle_caption"):
        trainer, prepared = made(command, *words.split(), "--gemma2_max_token_length=1000")
        reports[words] = "\n".join(Rehearsal(trainer, prepared).report())
    known, examples = reports.values()
    assert "2 texts of " in known and " examples of the texts of " in examples
    few, most = (float(re.search(r"largest batch: (\S+) MiB", report)[1]) for report in (known, examples))
    assert most > 3 * few


def test_what_is_cached_is_known_however_it_was_drawn(command):
    trainer, prepared = made(command, CACHED, "--shuffle_caption", "--max_caption_variants=3")
    texts = [text for item in prepared.manifest.items for text in caption_variants(item, 3)]
    assert len(texts) > len(CAPTIONS)
    assert longest_text(trainer, prepared.manifest) == most_tokens(trainer, texts)


def test_a_text_is_as_long_as_the_encoder_takes_at_most(command):
    trainer, prepared = made(command, "--gemma2_max_token_length=5")
    assert longest_text(trainer, prepared.manifest) == 5


def test_a_budget_is_planned_with_the_texts_of_the_run(command, caplog):
    """Half as many tokens, much less memory for activations; the same where texts can be any."""
    logger = logging.getLogger("flow_scripts.budget")
    logger.addHandler(caplog.handler)
    caplog.set_level("INFO", logger=logger.name)
    took = {}
    for words in ("", "--gemma2_max_token_length=1000", "--gemma2_max_token_length=1000 --shuffle_caption"):
        trainer, prepared = made(command, *words.split(), "--vram_budget=12GB")
        caplog.clear()
        planned(RunContext.decide(trainer, prepared))
        took[words] = re.search(r"of this, (.*?):", caplog.text)[1]
    logger.removeHandler(caplog.handler)
    first, same, more = took.values()
    assert first == same != more
