"""Write docs/flags.md: what became of every flag of sd-scripts' two Lumina scripts, and which are new.

The table is read off the parser itself; `tests/options/test_flags.py` fails when the page is out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

# Run as a file, the repository is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.core.files import write_text  # noqa: E402
from library.options.group import COMMON_FLAGS, OptionGroup, Refusal, group_classes  # noqa: E402
from library.options.train import LuminaFinetuneOptions, LuminaTrainOptions, TrainOptions  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "flags.md"
# The names of sd-scripts' flags, of the script that each of ours is named after.
SD_SCRIPTS_FLAGS = {
    LuminaTrainOptions: ROOT / "tools" / "sd_scripts_flags.txt",
    LuminaFinetuneOptions: ROOT / "tools" / "sd_scripts_flags_train.txt",
}

_HEAD = """\
# Every flag of lumina_train_network.py

Written by `python tools/flag_table.py` from the parser itself; do not edit it by hand.

The flags of sd-scripts' script of the same name are all here. Each one *works*; is *another name* of one that
works; has *no effect*, which asks for nothing that could change a result here: it is accepted, and a line of
the log says why; or is *refused*: accepted at its default, and otherwise answered with the reason and the way
out. *New* are those that sd-scripts does not have. (`--epoch` and `--noise_offset_type` are none of its
flags, but stand in every file that kohya_ss writes for it.)

A flag that works may have nothing to do in its company (`--vae_batch_size` without `--cache_latents`). If it
is one of sd-scripts', it is accepted, and a line of the log and of `--dry_run` says so.

`lumina_train.py`, which trains the model itself, has the same flags but for [a few](#lumina_trainpy).
"""
_WHOLE_MODELS = """
# lumina_train.py

It trains [the model itself](finetuning.md), and so does `kandinsky5_train.py`. Their flags are those above,
but for the following, which they alone have or which say something else there. `--mixed_precision fp16` is
refused: gradients of whole models overflow it.
"""


@dataclass(frozen=True)
class Flag:
    """A row: `refusal` is None for a flag that is accepted, `inert` is the reason for one that does nothing,
    `alias_of` is None for one under its own name.
    """

    name: str
    group: str
    default: object
    about: str
    refusal: Refusal | None = None
    inert: str | None = None
    alias_of: str | None = None


def flags(options: type[TrainOptions] = LuminaTrainOptions) -> list[Flag]:
    """Return all flags of a training script, in the order of `--help`."""
    rows = [Flag(name, "Configuration", None, about) for name, about in COMMON_FLAGS.items()]
    for group in group_classes(options).values():
        rows += _flags_of(group)
    return rows


def sd_scripts_flags(options: type[TrainOptions] = LuminaTrainOptions) -> list[str]:
    """Return the names of the flags of sd-scripts' script of the same name."""
    return SD_SCRIPTS_FLAGS[options].read_text(encoding="utf-8").split()


def page() -> str:
    """Return the text of docs/flags.md."""
    rows, theirs = flags(), set(sd_scripts_flags())
    lines = [_HEAD, *_counts(rows, theirs)]
    for group in dict.fromkeys(row.group for row in rows):
        lines += ["", f"## {group}", "", *_table([row for row in rows if row.group == group], theirs)]
    return "\n".join([*lines, *_whole_models(rows)]) + "\n"


def _whole_models(of_network: list[Flag]) -> Iterator[str]:
    """Yield the lines about the script that trains whole models: in what it differs."""
    rows, theirs = flags(LuminaFinetuneOptions), set(sd_scripts_flags(LuminaFinetuneOptions))
    known = {(row.name, row.about, row.default) for row in of_network}
    yield _WHOLE_MODELS
    yield from _counts(rows, theirs)
    yield ""
    yield from _table([row for row in rows if (row.name, row.about, row.default) not in known], theirs)
    missing = {row.name for row in of_network} - {row.name for row in rows}
    yield "\nFlags of a LoRA are answered with the name of the script that trains one:"
    yield ", ".join(f"`--{name}`" for name in sorted(missing)) + "."


def _table(rows: list[Flag], theirs: set[str]) -> list[str]:
    head = ["| flag | default | state | what it does, or why not |", "| --- | --- | --- | --- |"]
    return [*head, *(_line(row, theirs) for row in rows)]


def _flags_of(group: type[OptionGroup]) -> Iterator[Flag]:
    title = (group.__doc__ or group.__name__).strip().partition("\n")[0].rstrip(".")
    for f in fields(group):
        refusal, inert = f.metadata["refusal"], f.metadata["inert"]
        about = refusal.reason if refusal else inert or f.metadata["help"]
        yield Flag(f.name, title, f.default, about, refusal, inert)
        for alias in f.metadata["aliases"]:
            yield Flag(alias, title, f.default, about, alias_of=f.name)


def _counts(rows: list[Flag], theirs: set[str]) -> list[str]:
    known = [row for row in rows if row.name in theirs]
    refusals = sum(row.refusal is not None for row in known)
    inert = sum(row.inert is not None for row in known)
    aliases = sum(row.alias_of is not None for row in known)
    new = sum(_state(row, theirs).endswith(", new") for row in rows)
    return [
        f"Of sd-scripts' {len(theirs)} flags {len(known) - refusals - inert - aliases} work, {aliases} "
        f"{'is another name' if aliases == 1 else 'are other names'}, {inert} have no effect, and {refusals} "
        f"are refused. {new} flags are new."
    ]


def _line(row: Flag, theirs: set[str]) -> str:
    about = f"another name of `--{row.alias_of}`" if row.alias_of else row.about
    cells = [f"`--{row.name}`", _default(row.default), _state(row, theirs), about]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace('<', '&lt;') for cell in cells)} |"


def _state(row: Flag, theirs: set[str]) -> str:
    if row.refusal is not None:
        return "refused"
    if row.inert is not None:
        return "no effect"
    new = "" if row.name in theirs else ", new"
    return f"{'another name' if row.alias_of else 'works'}{new}"


def _default(value: object) -> str:
    if value is MISSING:
        return "required"
    if value is None or value == () or value == "":
        return ""
    return "off" if value is False else f"`{value}`"


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    write_text(PAGE, page())
    print(PAGE)


if __name__ == "__main__":
    main()
