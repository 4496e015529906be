"""Caching flags imply what they need, and none is accepted without effect."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from library.core.errors import ConfigError
from library.options.caching import CachingOptions
from library.options.group import parse_options


@dataclass(frozen=True)
class Options:
    caching: CachingOptions


def parse(*words):
    return parse_options(Options, words).caching


def test_nothing_is_cached_unless_asked_for():
    caching = parse()
    assert not caching.latents and not caching.texts
    assert (caching.cache_dtype, caching.max_caption_variants) == ("bf16", 16)


def test_to_disk_implies_caching():
    assert parse("--cache_latents_to_disk").latents
    assert parse("--cache_text_encoder_outputs_to_disk").texts
    assert not parse("--cache_latents_to_disk").texts


def test_all_flags_together():
    words = "--cache_latents --cache_text_encoder_outputs --vae_batch_size 4 --text_encoder_batch_size=2"
    caching = parse(
        *f"{words} --cache_directory somewhere --cache_dtype fp32 --max_caption_variants 3".split()
    )
    assert caching.cache_directory == Path("somewhere")
    assert (caching.vae_batch_size, caching.text_encoder_batch_size) == (4, 2)


@pytest.mark.parametrize(
    "words, needed",
    [
        (["--max_caption_variants", "2", "--cache_latents"], "--cache_text_encoder_outputs"),
        (["--cache_directory", "x"], "--cache_latents or --cache_text_encoder_outputs"),
        (["--cache_dtype", "fp32"], "--cache_latents or --cache_text_encoder_outputs"),
    ],
)
def test_a_flag_of_ours_without_effect_is_refused_with_what_it_needs(words, needed):
    with pytest.raises(ConfigError, match=f"{words[0]} has no effect without {needed};"):
        parse(*words)


def test_skip_cache_check_is_for_caches_on_disk():
    assert not list(parse("--cache_latents_to_disk", "--skip_cache_check").adjustments())
    (told,) = parse("--cache_latents", "--skip_cache_check").adjustments()
    assert told.startswith("--skip_cache_check has no effect: no cache is kept on disk")


@pytest.mark.parametrize("name", ["vae_batch_size", "text_encoder_batch_size", "max_caption_variants"])
def test_numbers_must_be_positive(name):
    with pytest.raises(ConfigError, match=f"--{name} is 0; it must be 1 or more"):
        parse("--cache_latents", "--cache_text_encoder_outputs", f"--{name}", "0")
