"""Where the loader gets latents and text features from: entries in memory or in cache files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.data.batch import Condition
from library.data.cache import CacheStore
from library.data.cache_keys import cache_directory, latents_key, text_key
from library.data.items import Item

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


class LatentSource:
    """Latents and masks of pictures, as `library.training.caching.cache_latents` left them.

    `identity` names the autoencoder and its settings: any text that changes when its output would.
    """

    def __init__(self, place: CachePlace, identity: str) -> None:
        self.entries = Entries("latents", place)
        self._identity = identity

    def key(self, item: Item) -> str:
        """Return the key of a picture's entry."""
        return latents_key(item, self._identity, self.entries.place.dtype)

    def get(self, item: Item, *, flip: bool) -> tuple[Tensor, Tensor | None]:
        """Return a picture's latents (C, h, w) and its mask (h, w), if it has one; mirrored if `flip`.

        Raises:
            DataError: the entry has gone or was damaged since the pass.
        """
        tensors = self.entries.get(item, self.key(item))
        suffix = FLIPPED if flip else ""
        return tensors["latents" + suffix], tensors.get("mask" + suffix)


class TextSource:
    """Text features, as `library.training.caching.cache_texts` left them.

    Args:
        identity: names the encoder, its tokenizer, the token limit and its settings.
        max_variants: how many texts are kept for a picture whose caption is drawn anew each time.
        prompt_of: makes what the encoder is given from a caption (the system prompt is added here).
    """

    def __init__(
        self,
        place: CachePlace,
        identity: str,
        *,
        max_variants: int,
        prompt_of: Callable[[str], str] = str,
    ) -> None:
        self.entries = Entries("texts", place)
        self.max_variants = max_variants
        self.prompt_of = prompt_of
        self._identity = identity

    def key(self, prompt: str) -> str:
        """Return the key of a prompt's entry; `prompt` is what the encoder is given."""
        return text_key(prompt, self._identity, self.entries.place.dtype)

    def condition(self, item: Item, caption: str) -> Condition:
        """Return the features of a picture's caption.

        Raises:
            DataError: the entry has gone or was damaged since the pass.
        """
        return Condition.from_tensors(self.entries.get(item, self.key(self.prompt_of(caption))))

    def prompt(self, prompt: str) -> Condition:
        """Return the features of one of the `prompts` that the pass was given; those are always in memory."""
        return Condition.from_tensors(self.entries.memory[self.key(prompt)])
