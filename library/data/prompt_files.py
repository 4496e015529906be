"""Prompts to draw: files of them, and the options written behind a prompt (`a red fox --w 768 --d 42`).

A line is its text up to the first ` --name`, then options. The text is never searched for anything else, so
a prompt may begin with "n" or "w 5" and hold dashes; only two dashes followed by a letter start an option.

What sd-scripts takes and draws otherwise than it says (a side of 900 pixels, a sampler for other models, a
picture for a ControlNet) is taken here too, and `tell` is given a sentence about it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library.core.errors import ConfigError
from library.core.files import read_text
from library.core.log import logger
from library.core.suggest import did_you_mean
from library.core.toml_file import read_content
from library.data.prompt import SourcePicture
from library.options.request import DRAWN_WITH_EULER, NOISE_SAMPLERS, SIZE_STEP, ImageRequest

WHAT = "The prompt file"
Tell = Callable[[str], None]
_log = logger("prompts")
_OPTION_START = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


@dataclass(frozen=True)
class _Option:
    """An inline option or a key of a prompt table: what it sets, and from what."""

    field: str
    convert: Callable[[str], object]
    kind: str


def _multipliers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _negative(text: str) -> str:
    return "" if text == "-" else text


def _picture(text: str) -> Path | None:
    if not text:
        raise ValueError("a path is not empty")
    return None if text == "-" else Path(text)


_INLINE = {
    "w": _Option("width", int, "a whole number"),
    "h": _Option("height", int, "a whole number"),
    "d": _Option("seed", int, "a whole number"),
    "s": _Option("steps", int, "a whole number"),
    "l": _Option("guidance_scale", float, "a number"),
    "g": _Option("guidance_scale", float, "a number"),
    "n": _Option("negative_prompt", _negative, "text"),
    "ctr": _Option("cfg_trunc_ratio", float, "a number"),
    "rcfg": _Option("renorm_cfg", float, "a number"),
    "fs": _Option("discrete_flow_shift", float, "a number"),
    "ss": _Option("sampler", str, "text"),
    "m": _Option("lora_multipliers", _multipliers, "numbers separated by commas"),
    "ci": _Option("source", _picture, "the path of a picture"),
}
_NO_CONTROLNET = "has no effect: there are no ControlNets here"
_TABLE_KEYS: dict[str, tuple[str, type]] = {
    "prompt": ("prompt", str),
    "negative_prompt": ("negative_prompt", str),
    "width": ("width", int),
    "height": ("height", int),
    "seed": ("seed", int),
    "sample_steps": ("steps", int),
    "scale": ("guidance_scale", float),
    "guidance_scale": ("guidance_scale", float),
    "cfg_trunc_ratio": ("cfg_trunc_ratio", float),
    "renorm_cfg": ("renorm_cfg", float),
    "discrete_flow_shift": ("discrete_flow_shift", float),
    "sample_sampler": ("sampler", str),
    "control_image": ("source", Path),
    "source": ("source", Path),
}
# Two names of the same thing: the second gives way to the first, as in sd-scripts.
_STRONGER_AND_WEAKER = (("l", "g"), ("scale", "guidance_scale"), ("source", "control_image"))
_KIND_NAMES = {str: "text", int: "a whole number", float: "a number", Path: "the path of a picture"}
_WRITTEN_AS = {float: (int, float), Path: str}  # in TOML and JSON; the others as themselves
_NOT_SAID = Path("\0")  # stands for the source of a prompt that says nothing of it; no file is called so


def parse_line(line: str, defaults: ImageRequest, tell: Tell = _log.info) -> ImageRequest:
    """Return the request of one line; what it does not set is taken from `defaults`, except the text.

    Raises:
        ConfigError: an option that does not exist, is given twice, or has a value that cannot be.
    """
    text, *options = _OPTION_START.split(line)
    found: dict[str, object] = {}
    for written in options:
        name, *rest = written.split(maxsplit=1)
        value = rest[0].strip() if rest else ""
        if name.lower() == "cn":
            tell(f"--{written.strip()} {_NO_CONTROLNET}")
            continue
        option = _find_inline(name)
        if name.lower() in found:
            raise ConfigError(f"--{name}: the {option.field} is given twice.")
        try:
            found[name.lower()] = option.convert(value)
        except ValueError:
            raise ConfigError(f"--{name}: '{value}' is not {option.kind}.") from None
    _drop_weaker(found, "--", tell)
    changes = {_INLINE[name].field: value for name, value in found.items()}
    return replace(defaults, prompt=text.strip(), **_drawable(changes, tell))


def next_request(line: str, previous: ImageRequest, start: ImageRequest) -> ImageRequest:
    """Return the request of a line typed after `previous`.

    Values stay as they were, but seed and negative prompt go back to those of `start`. A line of options
    alone draws the previous text again.
    """
    defaults = replace(previous, seed=start.seed, negative_prompt=start.negative_prompt)
    request = parse_line(line, defaults)
    return request if request.prompt else replace(request, prompt=previous.prompt)


def load_prompts(path: Path, defaults: ImageRequest, tell: Tell = _log.info) -> list[ImageRequest]:
    """Read a prompt file.

    `.txt`: one prompt a line, empty lines and lines that begin with # are skipped. `.json`: a list of such
    lines or of tables of keys, or a table that gives each of them a name. `.toml`: [prompt] with keys for
    all, and a [[prompt.subset]] for each prompt. What a prompt does not set is taken from `defaults`, except
    the text. A source picture's path is relative to the file's folder.

    Raises:
        ConfigError: the file cannot be read, holds no prompt, or has a mistake; the message names the place.
    """
    readers = {".txt": _from_text, ".json": _from_json, ".toml": _from_toml}
    reader = readers.get(Path(path).suffix.lower())
    if reader is None:
        raise ConfigError(f"{WHAT} {path} must end in .txt, .json or .toml.")
    requests = reader(Path(path), replace(defaults, prompt="", source=_NOT_SAID), tell)
    if not requests:
        raise ConfigError(f"{WHAT} {path} holds no prompt.")
    return [
        replace(request, source=_beside(path, request.source, otherwise=defaults.source))
        for request in requests
    ]


def load_sample_prompts(path: Path, defaults: ImageRequest, tell: Tell = _log.debug) -> list[ImageRequest]:
    """Read a file of sample prompts; the prompt number n without a seed gets the seed of `defaults` plus n.

    Raises:
        ConfigError: see `load_prompts`; or a prompt uses --m.
    """
    assert defaults.seed is not None
    requests = load_prompts(path, replace(defaults, seed=None), tell)
    if any(request.lora_multipliers for request in requests):
        raise ConfigError(f"{path}: --m weighs the LoRAs of the inference script; training has none.")
    return [
        request if request.seed is not None else replace(request, seed=(defaults.seed + n) % 2**63)
        for n, request in enumerate(requests)
    ]


def sources_of(requests: Sequence[ImageRequest], *, edits: bool) -> list[SourcePicture | None]:
    """Return the picture that each request is to be an edit of, cut to the request's size.

    Args:
        edits: whether the model can.

    Raises:
        ConfigError: it cannot, and a request asks for it. DataError: a source cannot be used.
    """
    from library.data.images import source_picture  # here, because it imports Pillow and numpy

    for request in requests:
        if request.source is not None and not edits:
            raise ConfigError(
                f"--ci {request.source} cannot be used: this model makes pictures from text alone; leave it "
                f"out."
            )
    return [
        None if request.source is None else source_picture(request.source, (request.width, request.height))
        for request in requests
    ]


def _beside(file: Path, source: Path | None, *, otherwise: Path | None) -> Path | None:
    """Return a source as it is meant in a prompt file."""
    if source == _NOT_SAID:
        return otherwise
    return None if source is None else Path(file).parent / source


def _find_inline(name: str) -> _Option:
    key = name.lower()
    if key not in _INLINE:
        raise ConfigError(
            f"there is no option --{name}{did_you_mean(key, _INLINE) or '.'} The options of a prompt are "
            f"{', '.join('--' + known for known in _INLINE)}."
        )
    return _INLINE[key]


def _drop_weaker(found: dict[str, object], dashes: str, tell: Tell) -> None:
    """Take out the weaker of two names of the same thing."""
    for stronger, weaker in _STRONGER_AND_WEAKER:
        if stronger in found and weaker in found:
            tell(f"{dashes}{weaker} {found.pop(weaker)} has no effect: {dashes}{stronger} is given and wins")


def _drawable(changes: dict[str, object], tell: Tell) -> dict[str, object]:
    """Round sides down, and replace samplers of other models."""
    for side in ("width", "height"):
        pixels = changes.get(side, 0)
        if pixels % SIZE_STEP and pixels > SIZE_STEP:
            changes[side] = pixels // SIZE_STEP * SIZE_STEP
            tell(f"the {side} {pixels} becomes {changes[side]}, the next lower multiple of {SIZE_STEP}")
    if changes.get("sampler") in NOISE_SAMPLERS:
        tell(f"the sampler {changes['sampler']} is not used: {DRAWN_WITH_EULER}")
        changes["sampler"] = "euler"
    return changes


def _placed(place: str, tell: Tell) -> Tell:
    """Put the place before what is told."""
    return lambda sentence: tell(f"{place}: {sentence}")


def _at(place: str, make: Callable[[], ImageRequest]) -> ImageRequest:
    """Run `make`, and put the place before the message of its mistake."""
    try:
        return make()
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def _from_text(path: Path, defaults: ImageRequest, tell: Tell) -> list[ImageRequest]:
    lines = enumerate(read_text(path, WHAT).splitlines(), start=1)
    return [
        _entry(line, defaults, f"{path}, line {number}", tell)
        for number, line in lines
        if line.strip() and not line.lstrip().startswith("#")
    ]


def _from_json(path: Path, defaults: ImageRequest, tell: Tell) -> list[ImageRequest]:
    content = read_content(path, WHAT)
    placed = enumerate(content, start=1) if isinstance(content, list) else _named(content, path)
    return [_entry(entry, defaults, f"{path}, prompt {place}", tell) for place, entry in placed]


def _named(content: object, path: Path) -> list[tuple[str, object]]:
    """Return the names and prompts of a table such as SimpleTuner's user_prompt_library."""
    if not isinstance(content, dict):
        raise ConfigError(f"{WHAT} {path} must hold a list of prompts, not a {type(content).__name__}.")
    for name, entry in content.items():
        if name in _TABLE_KEYS and (name == "prompt" or not isinstance(entry, str | dict)):
            raise ConfigError(
                f"{WHAT} {path} must hold a list of prompts, or a table of names and prompts, and '{name}' "
                f"is a setting of one prompt: put the table into a list."
            )
    return [(f"'{name}'", entry) for name, entry in content.items()]


def _from_toml(path: Path, defaults: ImageRequest, tell: Tell) -> list[ImageRequest]:
    content = read_content(path, WHAT)
    table = content.get("prompt") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not isinstance(table.get("subset"), list):
        raise ConfigError(f"{WHAT} {path} needs a table [prompt] with one [[prompt.subset]] for each prompt.")
    common = {key: value for key, value in table.items() if key != "subset"}
    place = f"{path}, [prompt]"
    shared = _at(place, lambda: _from_table(common, defaults, _placed(place, tell)))
    subsets = enumerate(table["subset"], start=1)
    return [_entry(entry, shared, f"{path}, subset {i}", tell) for i, entry in subsets]


def _entry(entry: object, defaults: ImageRequest, place: str, tell: Tell) -> ImageRequest:
    tell = _placed(place, tell)
    if isinstance(entry, str):
        return _at(place, lambda: parse_line(entry, defaults, tell))
    if isinstance(entry, dict):
        if not defaults.prompt and "prompt" not in entry:
            raise ConfigError(f"{place}: there is no prompt in it.")
        return _at(place, lambda: _from_table(entry, defaults, tell))
    raise ConfigError(f"{place}: a prompt is text or a table, not a {type(entry).__name__}.")


def _from_table(table: Mapping[str, object], defaults: ImageRequest, tell: Tell) -> ImageRequest:
    """Apply a table of keys. The prompt in it is text as it stands, without options."""
    changes: dict[str, object] = {}
    entries = dict(table)
    if "controlnet_image" in entries:
        tell(f"controlnet_image {entries.pop('controlnet_image')} {_NO_CONTROLNET}")
    _drop_weaker(entries, "", tell)
    for key, value in entries.items():
        if key not in _TABLE_KEYS:
            raise ConfigError(f"unknown key '{key}'{did_you_mean(key, _TABLE_KEYS) or '.'}")
        field, kind = _TABLE_KEYS[key]
        if isinstance(value, bool) or not isinstance(value, _WRITTEN_AS.get(kind, kind)):
            raise ConfigError(f"{key} = {value!r} is not {_KIND_NAMES[kind]}.")
        try:
            changes[field] = _picture(value) if kind is Path else kind(value)
        except ValueError as error:
            raise ConfigError(f"{key} = {value!r} is not {_KIND_NAMES[kind]}.") from error
    return replace(defaults, **_drawable(changes, tell))
