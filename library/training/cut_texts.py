"""Telling that texts are longer than an encoder takes, which is easily missed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from library.core.dist import Processes
from library.core.log import logger
from library.data.prompt import Prompt

if TYPE_CHECKING:
    from library.training.trainer import NetworkTrainer

_log = logger("texts")


class CutTexts:
    """Counts texts of which a text encoder does not take the end, or tells the first of them."""

    def __init__(self, trainer: NetworkTrainer) -> None:
        self._trainer = trainer
        self._seen: set[str] = set()  # since the last `tell`
        self._cut: Counter[str] = Counter()  # by encoder
        self._told: set[str] = set()

    def count(self, prompts: Sequence[Prompt]) -> None:
        """Count texts that are encoded, each once, for `tell`."""
        new = {prompt.text: prompt for prompt in prompts if prompt.text not in self._seen}
        self._seen |= new.keys()
        for prompt in new.values():
            self._cut.update(encoder for encoder, *_ in self._cuts(prompt))

    def tell(self, processes: Processes) -> None:
        """Tell what was counted, in all processes together, each of which must call this."""
        found = processes.gather((len(self._seen), dict(self._cut)))
        texts, cut = sum(count for count, _ in found), Counter[str]()
        for _, counts in found:
            cut.update(counts)
        for encoder, count in sorted(cut.items()):
            _log.warning(
                "%d of %d texts that were encoded are longer than %s takes, which are cut; --dry_run shows "
                "the longest",
                *(count, texts, encoder),
            )
        self._seen.clear()
        self._cut.clear()

    def tell_first(self, prompts: Sequence[Prompt]) -> None:
        """Tell the first text that an encoder does not take whole, then no other of that encoder."""
        for prompt in prompts:
            for encoder, count, limit in self._cuts(prompt):
                if encoder not in self._told:
                    self._told.add(encoder)
                    _log.warning(
                        "%s takes the first %d of %d tokens of this text, and of others that are too long: "
                        "%.80s...",
                        *(encoder, limit, count, prompt.text),
                    )

    def _cuts(self, prompt: Prompt) -> Iterator[tuple[str, int, int]]:
        """Yield the encoders that do not take a prompt whole: name, tokens, and how many it takes."""
        counts = {"the text encoder": self._trainer.count_tokens(prompt)}
        for encoder, (count, limit) in (counts | self._trainer.count_of_others(prompt)).items():
            if count > limit:
                yield encoder, count, limit
