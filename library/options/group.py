"""Options declared once: a frozen dataclass field is a command-line flag and a config-file key.

    @dataclass(frozen=True, kw_only=True)
    class OptimizerOptions(OptionGroup):
        \"\"\"Which optimizer, and how fast.\"\"\"
        learning_rate: float = option(2e-6, "peak learning rate")

A script's options are a frozen dataclass whose fields are such groups; `parse_options` fills it from
defaults, then `--config_file`, then the command line, with the same words for a mistake wherever it was made.
Nothing here or in the groups imports torch, so `--help` and every mistake answer at once.
"""

from __future__ import annotations

import argparse
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn, TypeVar

from library.core.errors import ConfigError
from library.core.files import write_text
from library.core.suggest import did_you_mean
from library.options.config_file import config_text, with_ending, words_of

REQUIRED = MISSING
COMMON_FLAGS = {
    "config_file": "read options from this TOML or JSON file (sections are flattened); the command line wins",
    "output_config": "write all options to the new file that --config_file names, and exit",
}


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    nargs: str | None = None,
    parse: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    aliases: Sequence[str] = (),
    saved: bool = True,
) -> Any:
    """Declare an option.

    `default=REQUIRED` makes it obligatory; `parse` converts one word and raises ValueError. `aliases` are
    other names of the same flag. `saved=False` keeps it out of written config files: passwords, and what is
    meant for one start only.
    """
    metadata = {"help": help, "choices": choices, "nargs": nargs, "parse": parse, "metavar": metavar}
    metadata |= {"aliases": tuple(aliases), "saved": saved, "refusal": None, "inert": None}
    return field(metadata=metadata) if default is REQUIRED else field(default=default, metadata=metadata)


def refused(reason: str, *, default: Any = None, harmless: Sequence[Any] = ()) -> Any:
    """Declare a flag of another tool that cannot be used here, so that whoever brings it is told why.

    It is accepted at its default and at `harmless` values, with which it asks for nothing; anything else is a
    ConfigError with the `reason`, which ends with the way out. `--help` leaves it out.
    """
    return _foreign(default, refusal=Refusal(reason, (default, *harmless)))


def inert(reason: str, *, default: Any = None) -> Any:
    """Declare a flag of another tool that asks for nothing that could change a result here.

    It is accepted, and `OptionGroup.adjustments` tells that it has no effect, because of `reason`. `--help`
    leaves it out.
    """
    return _foreign(default, inert=reason)


def _foreign(default: Any, *, refusal: Refusal | None = None, inert: str | None = None) -> Any:
    metadata = {"help": argparse.SUPPRESS, "choices": None, "nargs": None, "parse": None, "metavar": None}
    metadata |= {"aliases": (), "saved": False, "refusal": refusal, "inert": inert}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Refusal:
    """Why a flag cannot be used, and the values with which it asks for nothing."""

    reason: str
    harmless: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """Base of all groups. A subclass raises ConfigError in `__post_init__` for values that cannot be.

    A flag that a script brings along from sd-scripts and that does nothing here must not stop it: it belongs
    into `adjustments`. What would train something else than the words say stays an error.

    elsewhere: what to write in place of a flag that is none here; see library/options/elsewhere.py.
    """

    elsewhere: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag that is given but has no effect, with the reason.

        A subclass that knows more of them yields them too; `without_effect` words them.
        """
        for f in fields(self):
            if f.metadata["inert"] is not None:
                yield from self.without_effect((f.name,), f.metadata["inert"])

    def without_effect(self, names: Iterable[str], reason: str) -> Iterator[str]:
        """Yield the sentence of those flags of `names` that have another value than their default."""
        defaults = {f.name: f.default for f in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                yield f"--{name} has no effect: {reason}"

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Add one flag for each field; the class docstring heads the group in `--help`."""
        title, _, rest = (cls.__doc__ or cls.__name__).strip().partition("\n")
        group = parser.add_argument_group(title.rstrip("."), " ".join(rest.split()) or None)
        hints = typing.get_type_hints(cls)
        for f in fields(cls):
            kind, meta = _scalar_type(hints[f.name]), f.metadata
            names = [f"--{name}" for name in (f.name, *meta["aliases"])]
            text = _help_with_default(meta["help"], f.default)
            if kind is bool and f.default is True:  # what is on by default has to be told to be off
                group.add_argument(
                    *names,
                    type=_truth,
                    nargs="?",
                    const=True,
                    metavar="{true,false}",
                    default=argparse.SUPPRESS,
                    help=text,
                )
                continue
            if kind is bool:
                group.add_argument(*names, action="store_true", default=argparse.SUPPRESS, help=text)
                continue
            group.add_argument(
                *names,
                type=meta["parse"] or kind,
                choices=meta["choices"],
                nargs=meta["nargs"],
                metavar=meta["metavar"],
                default=argparse.SUPPRESS,
                help=text,
            )

    @classmethod
    def take(cls, values: dict[str, Any], *, in_part: bool = False) -> typing.Self:
        """Build the group from parsed values; lists become tuples.

        Raises ConfigError for missing obligatory ones; `in_part`, only when one of them is read.
        """
        missing = [f.name for f in fields(cls) if f.default is REQUIRED and f.name not in values]
        if missing and not in_part:
            raise _missing(missing)
        given = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        group = cls(**given, **dict.fromkeys(missing, REQUIRED))
        for name in missing:
            object.__delattr__(group, name)
        return group

    def __getattr__(self, name: str) -> NoReturn:
        """Answer for what is not there, such as an obligatory option that `take` did without."""
        if name in {f.name for f in fields(self)}:
            raise _missing([name])
        raise AttributeError(f"{type(self).__name__} has no {name}")


Options = TypeVar("Options")


def parse_options(
    options_class: type[Options],
    argv: Sequence[str] | None = None,
    description: str = "",
    *,
    in_part: bool = False,
) -> Options:
    """Read a script's options: defaults < `--config_file` < command line.

    Args:
        options_class: a frozen dataclass whose fields are OptionGroup subclasses.
        in_part: the script makes use of some of the options only. An obligatory one may be left out, and is
            missed (a ConfigError) when it is read.

    Raises:
        ConfigError: unknown flag or key, wrong type or choice, a missing obligatory option, or a combination
            that a group refuses.
        SystemExit: the options were written to a file, as `--output_config` asks.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    groups = group_classes(options_class)
    parser = build_parser(options_class, description)
    given = vars(_parse(parser, argv))
    if given["config_file"] and not given["output_config"]:
        file_words = words_of(given["config_file"], parser, parser.way_out)
        given = vars(_parse(parser, file_words + argv, given["config_file"]))
    _refuse(groups.values(), given)
    options = options_class(**{name: group.take(given, in_part=in_part) for name, group in groups.items()})
    if given["output_config"]:
        _write_config(given["config_file"], options)
    return options


def build_parser(options_class: type, description: str = "") -> _Parser:
    """Return the argparse parser of a script's options."""
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
    for group in group_classes(options_class).values():
        parser.elsewhere |= group.elsewhere
    parser.add_argument("--config_file", type=Path, help=COMMON_FLAGS["config_file"])
    parser.add_argument("--output_config", action="store_true", help=COMMON_FLAGS["output_config"])
    for group in group_classes(options_class).values():
        group.add_to(parser)
    return parser


def group_classes(options_class: type) -> dict[str, type[OptionGroup]]:
    """Return the groups of an options class by field name."""
    return typing.get_type_hints(options_class)


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are ConfigError, with a suggestion for a misspelt flag."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.elsewhere: dict[str, str] = {}
        # No flag begins with a digit: -6:-2:0.5 is a value, as -6 is.
        self._negative_number_matcher = re.compile(r"-\d")

    def way_out(self, name: str) -> str:
        """Return what a message says behind an option that there is not: a flag, or a key without dashes."""
        bare = name.removeprefix("--")
        if bare in self.elsewhere:
            return f": {self.elsewhere[bare]}."
        flags = self._option_string_actions
        valid = flags if name.startswith("--") else [flag.removeprefix("--") for flag in flags]
        return did_you_mean(name, valid) or "."

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.strip().rstrip(".") + ".")


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def _parse(parser: _Parser, words: list[str], config_file: Path | None = None) -> argparse.Namespace:
    try:
        namespace, unknown = parser.parse_known_args(words)
    except ConfigError as error:
        raise ConfigError(f"{config_file}: {error}" if config_file else str(error)) from None
    if unknown:
        word = unknown[0].partition("=")[0]
        way_out = parser.way_out(word) if word.startswith("--") else "."
        raise ConfigError(f"unknown argument '{word}'{way_out} See --help.")
    return namespace


def _write_config(path: Path | None, options: object) -> NoReturn:
    """Do what --output_config asks for, and leave."""
    if path is None:
        raise ConfigError("--output_config writes to the file that --config_file names: add --config_file.")
    path = with_ending(path)
    if path.exists():
        raise ConfigError(f"--output_config would overwrite {path}; name a new file with --config_file.")
    write_text(path, config_text(options))
    print(f"wrote {path}")
    sys.exit(0)


def _refuse(groups: Iterable[type[OptionGroup]], given: dict[str, Any]) -> None:
    """Raise one ConfigError for all flags that cannot be used: a long command line may have several."""
    reasons = []
    for f in (f for group in groups for f in fields(group)):
        refusal: Refusal | None = f.metadata["refusal"]
        if refusal is not None and f.name in given and given[f.name] not in refusal.harmless:
            reasons.append(f"--{f.name} cannot be used here: {refusal.reason}.")
    if reasons:
        raise ConfigError("\n".join(reasons))


def _missing(names: Iterable[str]) -> ConfigError:
    return ConfigError(f"missing: {', '.join(f'--{name}' for name in names)}. See --help.")


def _scalar_type(hint: Any) -> Any:
    """float | None -> float, tuple[str, ...] | None -> str: what argparse converts one word to."""
    parts = [t for t in typing.get_args(hint) if t not in (type(None), Ellipsis)]
    return _scalar_type(parts[0]) if parts else hint


def _truth(word: str) -> bool:
    """Read the word of a switch that is on by default."""
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{word}' is neither true nor false")
    return word.lower() == "true"


def _help_with_default(text: str, default: object) -> str:
    """argparse formats help with %, so a literal percent sign is doubled."""
    if text == argparse.SUPPRESS:
        return text
    shown = "" if default in (REQUIRED, None, False, "", ()) else f" (default: {default})"
    shown = " (required)" if default is REQUIRED else shown
    return (text + shown).replace("%", "%%")
