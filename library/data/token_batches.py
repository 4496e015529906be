"""Batches of as many pictures as fit into a number of tokens, whatever their sizes (--max_batch_tokens).

How many pictures of which number of tokens share a batch is the same in every epoch, so an epoch always has
the same number of steps. Which pictures they are changes: those with as many tokens take each other's places.
Only image tokens count; captions come on top.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from library.core.errors import ConfigError
from library.data.items import Manifest, Size


@dataclass(frozen=True)
class TokenBudget:
    """At most `limit` image tokens a batch and process; a token is `stride` x `stride` pixels."""

    limit: int
    stride: int

    def tokens(self, size: Size) -> int:
        """Return the image tokens of a picture of this size."""
        return (size[0] // self.stride) * (size[1] // self.stride)

    def check(self, manifest: Manifest) -> None:
        """Raise ConfigError if there is a picture that does not fit into a batch."""
        buckets = {manifest.items[index].geometry.bucket for index in manifest.train}
        width, height = max(buckets, key=self.tokens)
        most = self.tokens((width, height))
        if most > self.limit:
            raise ConfigError(
                f"--max_batch_tokens is {self.limit}, but a picture of {width}x{height} has {most} tokens; "
                f"give {most} or more, or lower the dataset's resolution."
            )


def fill(tokens: Iterable[int], limit: int) -> list[list[int]]:
    """Put numbers of tokens into as few batches as best-fit decreasing finds; return the batches' numbers.

    Each goes, the largest first, to where it leaves the least room; so no batch is above `limit`.
    """
    batches: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, number of the batch), sorted
    for number, count in sorted(Counter(tokens).items(), reverse=True):
        for _ in range(count):
            place = bisect_left(rooms, (number, 0))
            if place < len(rooms):
                room, batch = rooms.pop(place)
            else:
                room, batch = limit, len(batches)
                batches.append([])
            batches[batch].append(number)
            insort(rooms, (room - number, batch))
    return batches
