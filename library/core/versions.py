"""Whether the installed torch is new enough. Torch-free, because an old one may fail while it is imported."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from library.core.errors import ConfigError, MissingPackageError

OLDEST_TORCH = (2, 11)  # the oldest that the tests have been run with


def require_torch() -> None:
    """Find out before torch is imported whether it can be used.

    Raises:
        ConfigError: it is too old.
        MissingPackageError: it is not installed.
    """
    try:
        found = version("torch")
    except PackageNotFoundError:
        raise MissingPackageError("torch", "Training and drawing") from None
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is not None and tuple(map(int, numbers.groups())) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ConfigError(
            f"torch {found} is installed, and {oldest} or a later one is needed: run `pip install "
            "torch==2.13.0`, from the index that fits your GPU (pytorch.org)."
        )
