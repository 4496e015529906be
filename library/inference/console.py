"""Prompts typed at the keyboard."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from library.core.errors import UserError
from library.data.prompt_files import next_request
from library.options.request import ImageRequest

INTRODUCTION = (
    "Type a prompt, with options behind it: --w --h --s --d --g --n --ctr --rcfg --fs --ss --m, and --ci for "
    "models that edit pictures. "
    "Values stay for the next prompt, but seed and negative prompt do not. 'exit' ends."
)


def typed_requests(
    start: ImageRequest, complete: Callable[[ImageRequest], ImageRequest]
) -> Iterator[ImageRequest]:
    """Yield what is typed until 'exit' or the end of input; a mistake is explained and asked for again.

    Args:
        start: the values before the first prompt, and of seed and negative prompt before each.
        complete: fills in what a request leaves open; raises UserError for one that cannot be drawn with the
            models at hand.
    """
    print(INTRODUCTION)
    previous = start
    while (line := _ask()).lower() != "exit":
        if not line:
            continue
        try:
            request = next_request(line, previous, start)
            completed = complete(request)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        previous = request  # not what was filled in, which may be another thing the next time
        yield completed


def _ask() -> str:
    try:
        return input("prompt> ").strip()
    except EOFError:
        return "exit"
