"""`--network_args key=value ...`: declared as the fields of a frozen dataclass, parsed strictly. Torch-free.

@dataclass(frozen=True, kw_only=True)
class Args:
    attn_dim: int | None = arg(None, to_rank)
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from typing import Any, TypeVar

from library.core.errors import ConfigError
from library.core.suggest import did_you_mean
from networks.names import STARTS, is_anchored

Args = TypeVar("Args")
_PAIR = re.compile(r"\s*([^\s=].*?)\s*=\s*([^=,]+?)\s*(?:,|$)")  # a pattern may hold commas and =
_TABLE = re.compile(rf"(?:{_PAIR.pattern})+")
Parse = Callable[[str], Any]  # raises ValueError with what the value must be


def arg(default: Any, parse: Parse, *other_names: str) -> Any:
    """Declare a key: its default, how its text is read, and what other tools call it."""
    return field(default=default, metadata={"parse": parse, "names": other_names})


def parse_args(args_class: type[Args], given: Mapping[str, str], refused: Mapping[str, str]) -> Args:
    """Build `args_class` from texts by key.

    Args:
        refused: keys that other tools know and that are turned down here, with the reason.

    Raises:
        ConfigError: a key that is unknown or refused, or given under two names, or a value that cannot be.
    """
    parsers = {f.name: f.metadata["parse"] for f in fields(args_class)}
    own_names = {other: f.name for f in fields(args_class) for other in f.metadata["names"]}
    values: dict[str, Any] = {}
    for word, text in given.items():
        key = own_names.get(word, word)
        if key in values:
            raise ConfigError(f"--network_args: {word} is another name of {key}, which is given twice so.")
        if key in refused:
            raise ConfigError(f"--network_args {key}={text}: {refused[key]}.")
        if key not in parsers:
            raise ConfigError(
                f"--network_args: unknown key '{key}'{did_you_mean(key, [*parsers, *own_names]) or '.'}"
            )
        try:
            values[key] = parsers[key](text)
        except ValueError as error:
            raise ConfigError(f"--network_args {word}={text}: it must be {error}.") from None
    return args_class(**values)


def to_rank(text: str) -> int:
    """Read a rank."""
    if not text.strip().isdecimal():
        raise ValueError("a whole number, 0 to leave these layers out")
    return int(text)


def to_ranks(count: int, shape: str) -> Parse:
    """Return a reader of a list of `count` ranks; `shape` shows in messages what is meant."""

    def read(text: str) -> tuple[int, ...]:
        try:
            numbers = json.loads(text)
        except ValueError:
            numbers = None
        if not isinstance(numbers, list) or len(numbers) != count or not all(_is_rank(n) for n in numbers):
            raise ValueError(f"{shape} with {count} whole numbers")
        return tuple(numbers)

    return read


def to_rank_list(text: str) -> tuple[int, ...]:
    """Read ranks separated by commas."""
    return tuple(to_rank(word) for word in text.strip("[] ").split(","))


def to_positive_list(text: str) -> tuple[float, ...]:
    """Read positive numbers separated by commas."""
    return tuple(to_positive(word) for word in text.strip("[] ").split(","))


def to_patterns(text: str) -> tuple[re.Pattern[str], ...]:
    """Read one regular expression, or a list of them as Python writes it: ['a.*', 'b.*']."""
    try:
        words = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        words = [text]
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        words = [text]
    return tuple(_pattern(word) for word in words)


def to_pattern_table(read: Callable[[str], Any]) -> Parse:
    """Return a reader of `pattern=value,pattern=value`; `read` reads a value."""

    def read_table(text: str) -> tuple[tuple[re.Pattern[str], Any], ...]:
        if not _TABLE.fullmatch(text):
            raise ValueError("pattern=value, separated by commas")
        return tuple((_pattern(pair[1]), read(pair[2])) for pair in _PAIR.finditer(text))

    return read_table


def to_probability(text: str) -> float:
    """Read a dropout probability."""
    return _number(text, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def to_positive(text: str) -> float:
    """Read a positive number."""
    return _number(text, lambda value: 0 < value < float("inf"), "a number above 0")


def to_bool(text: str) -> bool:
    """Read True or False."""
    words = {"true": True, "1": True, "false": False, "0": False}
    if text.strip().lower() not in words:
        raise ValueError("True or False")
    return words[text.strip().lower()]


def to_start(text: str) -> str:
    """Read what a LoRA starts from, by peft's names; True is peft's for its own default."""
    name = "kaiming" if text.strip().lower() == "true" else text.strip()
    if name not in STARTS and not is_anchored(name):
        raise ValueError(f"one of {', '.join(STARTS)}, where 16 may be another number of rounds")
    return name


def to_choice(*names: str) -> Parse:
    """Return a reader of one of `names`."""

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return text

    return read


def _number(text: str, fits: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(what) from None
    if not fits(value):
        raise ValueError(what)
    return value


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"a regular expression ('{text}': {error})") from None


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
