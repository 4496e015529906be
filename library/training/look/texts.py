"""The texts of a run: what its text encoder is given, and how many tokens that is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.data.captions import all_texts_fit, caption_variants
from library.data.images import source_variants
from library.data.items import Item, Manifest
from library.data.prompt import Prompt

if TYPE_CHECKING:
    from library.training.trainer import NetworkTrainer

_VARIANTS_WITHOUT_CACHE = 16  # texts looked at of a caption that is drawn anew each time


def prompts_of_run(trainer: NetworkTrainer, manifest: Manifest) -> dict[Prompt, Item]:
    """Return what the text encoder is given, each with a picture that has it.

    Where texts are not cached, and more can be drawn of a caption than are looked at, these are examples.
    """
    return {
        Prompt(trainer.format_prompt(caption), source): item
        for item in items_of_run(manifest)
        for caption in caption_variants(item, _most_variants(trainer))
        for source in source_variants(item, trainer.source_dropout())
    }


def all_are_known(trainer: NetworkTrainer, manifest: Manifest) -> bool:
    """Whether `prompts_of_run` are all, and not examples."""
    most = _most_variants(trainer)
    items = () if trainer.options.caching.texts else items_of_run(manifest)
    return all(item.held_out or all_texts_fit(item, most) for item in items)


def longest_text(trainer: NetworkTrainer, manifest: Manifest) -> int | None:
    """Return the tokens of the longest text with its source, as far as the encoder takes them.

    None: not all texts are known, as captions are drawn anew each time.
    """
    if not all_are_known(trainer, manifest):
        return None
    prompts = prompts_of_run(trainer, manifest)
    return max((min(trainer.count_tokens(prompt)) for prompt in prompts), default=None)


def items_of_run(manifest: Manifest) -> list[Item]:
    """Return all pictures that are trained on or held out."""
    return [manifest.items[i] for i in (*manifest.train, *manifest.validation)]


def _most_variants(trainer: NetworkTrainer) -> int:
    caching = trainer.options.caching
    return caching.max_caption_variants if caching.texts else _VARIANTS_WITHOUT_CACHE
