"""What lies in folders: pictures, and datasets laid out as `<repeats>_<class tokens>` folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from library.core.errors import ConfigError, DataError
from library.core.files import explain
from library.options.dataset import DatasetOptions

PICTURE_ENDINGS = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl", ".gif", ".tif", ".tiff"}
)


def is_picture(path: Path) -> bool:
    """Whether a file's name is that of a picture. Hidden files are none (macOS leaves such about)."""
    return path.suffix.lower() in PICTURE_ENDINGS and not path.name.startswith(".")


def pictures_in(folder: Path, *, recursive: bool) -> Iterator[Path]:
    """Yield the pictures of a folder, sorted by name; hidden and linked subfolders are never entered.

    Raises:
        DataError: a folder cannot be read.
    """
    for parent, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        for name in sorted(files):
            path = Path(parent, name)
            if is_picture(path):
                yield path


def _refuse(error: OSError) -> None:
    raise DataError(f"The folder {error.filename} cannot be read: {explain(error)}.") from error


def source_from_options(
    options: DatasetOptions, *, edits: bool, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Return the dataset configuration that --train_data_dir, --reg_data_dir and --in_json stand for.

    Args:
        edits: --conditioning_data_dir has what is edited, and not masks.
        tell: is given a sentence for each folder of pictures that is left out.

    Raises:
        ConfigError: a folder is missing or not laid out as `<repeats>_<class tokens>`; flags that do not go
            together.
    """
    if options.conditioning_data_dir and not (options.masked_loss or edits):
        raise ConfigError("--conditioning_data_dir has no effect without --masked_loss; add it.")
    if options.in_json:
        subset = {"metadata_file": str(options.in_json)}
        if options.train_data_dir:
            subset["image_dir"] = str(options.train_data_dir)
        return {"datasets": [{"subsets": [subset]}]}
    subsets = _subsets_of(options.train_data_dir, "--train_data_dir", tell)
    if options.conditioning_data_dir:
        if options.reg_data_dir and not edits:
            raise ConfigError("--conditioning_data_dir cannot go with --reg_data_dir; leave out one of them.")
        for subset in subsets:
            subset["conditioning_data_dir"] = str(
                options.conditioning_data_dir / Path(subset["image_dir"]).name
            )
    if options.reg_data_dir:
        pictures = _subsets_of(options.reg_data_dir, "--reg_data_dir", tell)
        subsets += [subset | {"is_reg": True} for subset in pictures]
    return {"datasets": [{"subsets": subsets}]}


def _subsets_of(parent: Path, flag: str, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    try:
        entries = sorted(parent.iterdir())
    except OSError as error:
        raise ConfigError(f"{flag} {parent} cannot be read: {explain(error)}.") from error
    subsets, unnamed = [], []
    for folder in (entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")):
        number, _, name = folder.name.partition("_")
        if number.isdecimal() and int(number) >= 1:
            subset = {"image_dir": str(folder), "num_repeats": int(number)}
            subsets.append(subset | ({"class_tokens": name} if name else {}))
        elif any(is_picture(entry) for entry in folder.iterdir()):
            unnamed.append(folder)
    for folder in unnamed:
        about = f"{flag}: the folder {folder} holds pictures, but its name does not begin with how often"
        if not subsets:
            raise ConfigError(
                f"{about} they are to be used. Call it 1_{folder.name}, or describe it in a --dataset_config."
            )
        tell(f"{about} they are to be used, as 1_{folder.name} would: it is left out")
    if not subsets:
        advice = "put the pictures into such a folder, for example 10_cat"
        if any(map(is_picture, entries)):
            advice = f"it holds pictures itself, so call it for example 10_{parent.name}, and name its parent"
        raise ConfigError(
            f"{flag} {parent} has no folder named <repeats>_<class tokens>: {advice}; or describe the "
            f"pictures in a --dataset_config."
        )
    return subsets
