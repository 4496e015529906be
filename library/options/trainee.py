"""What is trained (the trainee), a network or a model's own weights: the options of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from library.core.errors import ConfigError
from library.options.caching import CachingOptions
from library.options.group import OptionGroup, option


@dataclass(frozen=True, kw_only=True)
class TraineeOptions(OptionGroup):
    """What is trained, and what it starts from.

    `new_start`: how a run that cannot be resumed is begun anew from what was saved, for messages.
    `stays`: flags that must be the same when a run is resumed, because of what is trained, with the reasons.
    `architecture_suffix`: what ModelSpec puts behind the model's name.
    """

    new_start: ClassVar[str]
    stays: ClassVar[Mapping[str, str]] = MappingProxyType({})
    architecture_suffix: ClassVar[str] = ""

    base_weights: tuple[Path, ...] = option(
        (),
        "LoRA files that are merged into the models before training",
        nargs="*",
        parse=Path,
        metavar="PATH",
    )
    base_weights_multiplier: tuple[float, ...] = option(
        (), "strengths of --base_weights, 1 where there are fewer", nargs="*", parse=float, metavar="NUMBER"
    )

    def __post_init__(self) -> None:
        weights, multipliers = self.base_weights, self.base_weights_multiplier
        if len(multipliers) > len(weights):
            raise ConfigError(
                f"--base_weights_multiplier gives {len(multipliers)} strengths, but --base_weights names "
                f"{len(weights)} files."
            )
        if not all(math.isfinite(multiplier) for multiplier in multipliers):
            given = " ".join(map(str, multipliers))
            raise ConfigError(f"--base_weights_multiplier {given}: each must be a finite number.")

    @property
    def trains_dit(self) -> bool:
        """Whether the DiT is trained, or a network on it."""
        return True

    @property
    def freezes_dit(self) -> bool:
        """Whether the DiT's own weights stay as they are, however they are kept."""
        return True

    @property
    def fused(self) -> bool:
        """Whether weights are updated while gradients are still being computed."""
        return False

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the text encoder is trained, or a network on it."""
        return False

    @property
    def shaped_by(self) -> Path | None:
        """The file whose content decides the shapes of what is trained, if there is one."""
        return None

    def described(self) -> dict[str, object]:
        """Return what the metadata say in other words than those of the flags."""
        return {}

    def settings(self) -> dict[str, object]:
        """Return what a state records in other words than those of the flags."""
        return {}

    def bases(self) -> tuple[tuple[Path, float], ...]:
        """Return the files of `--base_weights`, each with its strength."""
        missing = len(self.base_weights) - len(self.base_weights_multiplier)
        return tuple(zip(self.base_weights, (*self.base_weights_multiplier, *[1.0] * missing), strict=True))

    def check_caches(self, caching: CachingOptions) -> None:
        """Raise ConfigError if the text encoder is trained, but what it says is kept in a cache."""
        if self.trains_text_encoder and caching.texts:
            raise ConfigError(
                "--cache_text_encoder_outputs keeps what the text encoder says before training, so a LoRA on "
                "it would learn nothing. Leave the cache out, or leave out what asks for that LoRA: "
                "--network_train_text_encoder, --network_train_text_encoder_only, --text_encoder_lr."
            )
