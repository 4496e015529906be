"""Sample pictures during training: when, and from which prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.core.errors import ConfigError
from library.options.group import OptionGroup, option
from library.options.request import DRAWN_WITH_EULER, NOISE_SAMPLERS, SAMPLERS


@dataclass(frozen=True, kw_only=True)
class SampleOptions(OptionGroup):
    """Sample pictures during training."""

    sample_prompts: Path | None = option(
        None, "file of prompts (.txt one a line, .toml or .json), read again at every preview"
    )
    sample_every_n_steps: int | None = option(None, "draw the prompts every N optimizer steps")
    sample_every_n_epochs: int | None = option(None, "draw the prompts every N epochs")
    sample_at_first: bool = option(False, "draw the prompts once before training")
    sample_sampler: str = option(
        "euler",
        "sampler of the pictures: euler; heun, which asks the model twice a step; dpmsolver++ (2M); the "
        "other names mean euler",
        choices=(*SAMPLERS, *NOISE_SAMPLERS),
    )
    sample_batch_size: int = option(
        1,
        "pictures of equal settings drawn together; above 1 is faster, but can change a picture's last bits",
    )
    sequential_cfg: bool = option(
        False, "let prompt and negative prompt go through the model one after the other: less memory"
    )
    sample_compare_base: bool = option(
        False, "draw every prompt once without the LoRA too, to compare with: <name>-base_..."
    )

    def __post_init__(self) -> None:
        for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} is {value}; it must be 1 or more.")
        if self.scheduled and self.sample_prompts is None:
            raise ConfigError(
                "sample pictures are asked for, but --sample_prompts does not name a file of prompts."
            )
        if self.sample_compare_base and not self.scheduled:
            raise ConfigError(
                "--sample_compare_base has no pictures to compare with: add --sample_prompts, and "
                "--sample_every_n_epochs, --sample_every_n_steps or --sample_at_first."
            )

    @property
    def scheduled(self) -> bool:
        """Whether pictures are drawn at any time."""
        return bool(self.sample_at_first or self.sample_every_n_steps or self.sample_every_n_epochs)

    @property
    def prompts(self) -> Path | None:
        """The file of the prompts that are drawn, if any are."""
        return self.sample_prompts if self.scheduled else None

    @property
    def sampler(self) -> str:
        """The sampler that draws the pictures."""
        return self.sample_sampler if self.sample_sampler in SAMPLERS else "euler"

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag about pictures that are not drawn, or drawn otherwise."""
        yield from super().adjustments()
        if not self.scheduled:
            reason = "nothing says when to draw (--sample_every_n_epochs, ..._steps or --sample_at_first)"
            names = ("sample_prompts", "sample_sampler", "sample_batch_size", "sequential_cfg")
            yield from self.without_effect(names, reason)
        elif self.sample_sampler in NOISE_SAMPLERS:
            yield f"--sample_sampler {self.sample_sampler} has no effect: {DRAWN_WITH_EULER}"
