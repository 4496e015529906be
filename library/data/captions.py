"""Captions drawn from the text beside a picture.

    line        one line at random with `enable_wildcard`, else the first
    affixes     prefix + " " + line + " " + suffix
    wildcards   {a|b|c} becomes one of them; {{ and }} are plain braces
    tags        fixed ones stay; flexible ones are cut by the warm-up, shuffled, dropped
    secondary   the secondary separator becomes the separator

and now and then, by caption dropout, the whole caption is empty. Where no option works on tags, the caption
stays as it was written.

A picture that is held out has one caption, a function of its text: all tags in the order written, and of what
is drawn, the first variant. It is the same for every seed, so that runs can be compared.

A draw is a function of (seed, epoch, item, repeat). For captions that are encoded ahead of time the number of
texts must be bounded: lines and wildcards are all enumerated where they fit `max_variants`; otherwise that
many texts are sampled, each a function of (the text, its number), so that a run with another seed finds the
same ones in the cache.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from library.core.seeds import derive, rng, unit
from library.data.items import CaptionOptions, Item

_WILDCARD = re.compile(r"(?P<brace>\{\{|\}\})|\{(?P<choices>[^{}]+)\}")


@dataclass(frozen=True)
class _Tags:
    """A caption in parts; only the flexible ones are cut, shuffled and dropped."""

    fixed: list[str]
    flexible: list[str]
    fixed_end: list[str]


def draw_caption(
    item: Item,
    *,
    seed: int,
    epoch: int,
    repeat: int,
    step: int,
    total_steps: int,
    max_variants: int | None = None,
) -> str:
    """Return the caption of one draw of an item.

    Args:
        epoch: from 0. With `caption_dropout_every_n_epochs` of N, epochs N - 1, 2N - 1, ... have empty
        captions. step: optimizer step from 0 of `total_steps`; they say how far the token warm-up is.
        max_variants: draw only among `caption_variants(item, max_variants)`; None draws without bound.
    """
    if item.held_out:
        return _fixed(item)
    options, purpose = item.subset.captions, (epoch, item.index, repeat)
    if _whole_epoch_is_dropped(options, epoch):
        return ""
    if options.caption_dropout_rate > unit(seed, "caption dropout", *purpose):
        return ""
    if max_variants is None or all_texts_fit(item, max_variants):
        source = rng(seed, "caption", *purpose)
        tags = _draw_tags(item, source)
        return _finish(tags, options, source, _tags_so_far(options, len(tags.flexible), step, total_steps))
    variant = derive(seed, "caption variant", *purpose) % max_variants
    count = len(_draw_tags(item, _source_of(item, variant)).flexible)
    kept = _tags_so_far(options, count, step, total_steps)
    if kept < count:
        return _variant(item, kept % max_variants, kept)
    return _variant(item, variant, None)


def caption_variants(item: Item, max_variants: int) -> tuple[str, ...]:
    """Return all texts that `draw_caption` can return for this item and `max_variants`, without repeats.

    There are at most `max_variants`, the empty one of caption dropout, and with a token warm-up one more for
    each number of tags on the way.
    """
    if item.held_out:
        return (_fixed(item),)
    options = item.subset.captions
    texts = dict.fromkeys(_texts(item, max_variants))
    if options.caption_dropout_rate > 0 or options.caption_dropout_every_n_epochs > 0:
        texts[""] = None
    return tuple(texts)


def _texts(item: Item, max_variants: int) -> Iterator[str]:
    if all_texts_fit(item, max_variants):
        yield from _all_texts(item)
        return
    for number in range(max_variants):
        yield _variant(item, number, None)
    options = item.subset.captions
    if options.token_warmup_step > 0:
        counts = (len(_draw_tags(item, _source_of(item, n)).flexible) for n in range(max_variants))
        for kept in range(options.token_warmup_min, max(counts)):
            yield _variant(item, kept % max_variants, kept)


def _fixed(item: Item) -> str:
    options, source = item.subset.captions, _source_of(item, 0)
    calm = replace(options, shuffle_caption=False, caption_tag_dropout_rate=0.0)
    return _finish(_draw_tags(item, source), calm, source, None)


def _variant(item: Item, number: int, kept: int | None) -> str:
    """Return a sampled text; `kept` is how many flexible tags the warm-up leaves, None leaves all."""
    source = _source_of(item, number)
    return _finish(_draw_tags(item, source), item.subset.captions, source, kept)


def _source_of(item: Item, number: int) -> random.Random:
    return rng(0, "caption variant", item.text, number)


def all_texts_fit(item: Item, max_variants: int) -> bool:
    """Whether only lines and wildcards vary, and all their combinations fit."""
    options = item.subset.captions
    if options.shuffle_caption or options.caption_tag_dropout_rate > 0 or options.token_warmup_step > 0:
        return False
    return sum(math.prod(map(len, parts)) for parts in _lines_in_parts(item)) <= max_variants


def _all_texts(item: Item) -> Iterator[str]:
    options, unused = item.subset.captions, random.Random(0)  # nothing is left to chance when all texts fit
    for parts in _lines_in_parts(item):
        for chosen in product(*parts):
            yield _finish(_split("".join(chosen), options), options, unused, None)


def _draw_tags(item: Item, source: random.Random) -> _Tags:
    parts = source.choice(_lines_in_parts(item))
    return _split("".join(source.choice(part) for part in parts), item.subset.captions)


def _lines_in_parts(item: Item) -> list[list[list[str]]]:
    """For each line that may be drawn: its parts, each with the texts that may stand there."""
    options = item.subset.captions
    lines = [line.strip() for line in item.text.split("\n") if line.strip()] or [""]
    if not options.enable_wildcard:
        return [[[_with_affixes(lines[0], options)]]]
    return [_wildcard_parts(_with_affixes(line, options)) for line in lines]


def _with_affixes(line: str, options: CaptionOptions) -> str:
    return " ".join(part for part in (options.caption_prefix, line, options.caption_suffix) if part)


def _wildcard_parts(text: str) -> list[list[str]]:
    parts, done = [], 0
    for found in _WILDCARD.finditer(text):
        parts.append([text[done : found.start()]])
        parts.append([found["brace"][0]] if found["brace"] else found["choices"].split("|"))
        done = found.end()
    return [*parts, [text[done:]]]


def _split(caption: str, options: CaptionOptions) -> _Tags:
    """Split a caption into tags if an option works on them; else it is one fixed part."""
    divider = options.keep_tokens_separator
    if divider and divider in caption:
        fixed, flexible, *end = caption.split(divider, 2)
        return _Tags(_tags(fixed, options), _tags(flexible, options), _tags("".join(end), options))
    if options.shuffle_caption or options.caption_tag_dropout_rate > 0 or options.token_warmup_step > 0:
        tags = _tags(caption, options)
        return _Tags(tags[: options.keep_tokens], tags[options.keep_tokens :], [])
    return _Tags([caption.strip()], [], [])


def _tags(text: str, options: CaptionOptions) -> list[str]:
    return [tag.strip() for tag in text.split(options.caption_separator) if tag.strip()]


def _finish(tags: _Tags, options: CaptionOptions, source: random.Random, kept: int | None) -> str:
    flexible = tags.flexible[:kept]
    if options.shuffle_caption:
        source.shuffle(flexible)
    rate = options.caption_tag_dropout_rate
    if rate > 0:
        flexible = [tag for tag in flexible if source.random() >= rate]
    caption = ", ".join([*tags.fixed, *flexible, *tags.fixed_end])
    if options.secondary_separator:
        caption = caption.replace(options.secondary_separator, options.caption_separator)
    return caption


def _tags_so_far(options: CaptionOptions, count: int, step: int, total_steps: int) -> int:
    """How many of `count` flexible tags the warm-up has reached; it grows linearly with the steps."""
    steps = options.token_warmup_step
    if steps < 1:
        steps = math.floor(steps * total_steps)
    if step >= steps:
        return count
    least = options.token_warmup_min
    return min(count, math.floor(step * ((count - least) / steps)) + least)


def _whole_epoch_is_dropped(options: CaptionOptions, epoch: int) -> bool:
    every = options.caption_dropout_every_n_epochs
    return every > 0 and (epoch + 1) % every == 0
