"""How much of a GPU's memory a run may take."""

from __future__ import annotations

import re
from dataclasses import dataclass

from library.core.errors import ConfigError
from library.options.group import OptionGroup, option

AUTO = "auto"
_UNITS = {"": 2**30, "G": 2**30, "M": 2**20}
_AMOUNT = re.compile(r"([\d.]+)\s*([GM]?)(?:i?B)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(OptionGroup):
    """Memory budget.

    Chooses --checkpoint_mode, --blocks_to_swap and --base_quant so that a run fits; those that you give stay
    as they are. See docs/memory.md.
    """

    vram_budget: str | None = option(
        None,
        "memory of the GPU that training may take, such as 12GB (of 2^30 bytes, like those of a card); auto "
        "for what is free",
        metavar="AMOUNT",
    )
    plan_memory: bool = option(
        False,
        "do not train; make a step in every way on this device, and print what it took beside what was "
        "foretold; with --vram_budget also what to choose by that",
        saved=False,
    )

    def __post_init__(self) -> None:
        if self.vram_budget is not None and self.vram_budget != AUTO:
            self.bytes_allowed  # noqa: B018  (a mistake in it shows here)

    @property
    def bytes_allowed(self) -> int:
        """The amount in bytes, if one is given. Raises ConfigError if it is none."""
        assert self.vram_budget is not None and self.vram_budget != AUTO
        match = _AMOUNT.fullmatch(self.vram_budget.strip())
        try:
            amount = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
        except ValueError:
            amount = 0.0
        if amount <= 0:
            raise ConfigError(
                f"--vram_budget is '{self.vram_budget}'; give an amount such as 12GB or 800MB, or auto."
            )
        return round(amount)
