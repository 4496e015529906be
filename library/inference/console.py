"""Prompts typed at the keyboard."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from library.core.errors import ConfigError
from library.data.prompt_files import next_request
from library.options.request import ImageRequest

INTRODUCTION = (
    "Type a prompt, with options behind it: --w --h --s --d --g --n --ctr --rcfg --fs --m. "
    "Values stay for the next prompt, but seed and negative prompt do not. 'exit' ends."
)


def typed_requests(start: ImageRequest, check: Callable[[ImageRequest], None]) -> Iterator[ImageRequest]:
    """Yield what is typed until 'exit' or the end of input; a mistake is explained and asked for again.

    Args:
        start: the values before the first prompt, and of seed and negative prompt before each.
        check: raises ConfigError for a request that cannot be drawn with the models at hand.
    """
    print(INTRODUCTION)
    previous = start
    while (line := _ask()).lower() != "exit":
        if not line:
            continue
        try:
            request = next_request(line, previous, start)
            check(request)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        previous = request
        yield request


def _ask() -> str:
    try:
        return input("prompt> ").strip()
    except EOFError:
        return "exit"
