"""Cached latents and text features, as the loader reads them: entries in memory or in cache files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from library.data.batch import Condition
from library.data.cache import CacheStore
from library.data.cache_keys import cache_directory, latents_key, text_key
from library.data.captions import caption_variants
from library.data.images import source_variants
from library.data.items import Item
from library.data.prompt import Prompt, SourcePicture

FLIPPED = "_flipped"  # ends the names of a mirrored picture's tensors
Tensors = dict[str, Tensor]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class CachePlace:
    """Where entries are kept and in which precision ("bf16" or "fp32").

    `to_disk=False` keeps them in memory; entries that an earlier pass wrote to disk are still used, and none
    is written. `directory` replaces the hidden folder beside the pictures.
    """

    to_disk: bool
    directory: Path | None = None
    dtype: str = "bf16"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision as torch names it."""
        return _DTYPES[self.dtype]


class Entries:
    """Entries of one kind ("latents" or "texts"): from memory where they are there, else from disk."""

    def __init__(self, kind: str, place: CachePlace) -> None:
        self.place = place
        self.memory: dict[str, Tensors] = {}
        self._kind = kind
        self._stores: dict[Path, CacheStore] = {}

    def store(self, item: Item) -> CacheStore:
        """Return the store in which an item's entries are kept."""
        directory = cache_directory(item, self.place.directory) / self._kind
        if directory not in self._stores:
            self._stores[directory] = CacheStore(directory)
        return self._stores[directory]

    def get(self, item: Item, key: str) -> Tensors:
        """Return an entry's tensors. Raises DataError if it has gone or was damaged since the pass."""
        return self.memory.get(key) or self.store(item).read(key)

    def remember(self) -> None:
        """Write down what was verified, for the next start; in memory mode nothing is ever written."""
        if self.place.to_disk:
            for store in self._stores.values():
                store.remember()


class Latents(NamedTuple):
    """What is kept of a picture: its latents (C, h, w), its mask (h, w), the latents of what it is an edit
    of."""

    picture: Tensor
    mask: Tensor | None
    source: Tensor | None


class LatentCache:
    """Latents and masks of pictures, as `library.training.caching.cache_latents` left them.

    `identity` names the autoencoder and its settings: any text that changes when its output would.
    """

    def __init__(self, place: CachePlace, identity: str) -> None:
        self.entries = Entries("latents", place)
        self._identity = identity

    def key(self, item: Item) -> str:
        """Return the key of a picture's entry."""
        return latents_key(item, self._identity, self.entries.place.dtype)

    def get(self, item: Item, *, flip: bool) -> Latents:
        """Return what is kept of a picture, mirrored if `flip`.

        Raises:
            DataError: the entry has gone or was damaged since the pass.
        """
        tensors = self.entries.get(item, self.key(item))
        suffix = FLIPPED if flip else ""
        return Latents(
            tensors["latents" + suffix], tensors.get("mask" + suffix), tensors.get("source" + suffix)
        )


class TextCache:
    """Text features, as `library.training.caching.cache_texts` left them.

    Args:
        identity: names the encoder, its tokenizer, the token limit and its settings.
        max_variants: how many texts are kept for a picture whose caption is drawn anew each time.
        prompt_of: makes what the encoder is given from a caption (the system prompt is added here).
        source_dropout: share of the draws of an edited picture that go without its source; above 0, captions
            are kept without it too.
    """

    def __init__(
        self,
        place: CachePlace,
        identity: str,
        *,
        max_variants: int,
        prompt_of: Callable[[str], str] = str,
        source_dropout: float = 0.0,
    ) -> None:
        self.entries = Entries("texts", place)
        self.max_variants = max_variants
        self._prompt_of = prompt_of
        self._source_dropout = source_dropout
        self._identity = identity

    def key(self, prompt: Prompt) -> str:
        """Return the key of a prompt's entry."""
        return text_key(prompt, self._identity, self.entries.place.dtype)

    def prompts(self, item: Item) -> list[Prompt]:
        """Return everything that the encoder can be given for an item."""
        captions = caption_variants(item, self.max_variants)
        sources = source_variants(item, self._source_dropout)
        return [Prompt(self._prompt_of(caption), source) for caption in captions for source in sources]

    def condition(self, item: Item, caption: str, source: SourcePicture | None = None) -> Condition:
        """Return the features of a picture's caption, with the source that the encoder sees.

        Raises:
            DataError: the entry has gone or was damaged since the pass.
        """
        prompt = Prompt(self._prompt_of(caption), source)
        return Condition.from_tensors(self.entries.get(item, self.key(prompt)))
