"""Which encoder outputs are kept, where, and how the passes that make them run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from library.core.errors import ConfigError
from library.options.group import OptionGroup, option

DEFAULT_MAX_VARIANTS = 16


@dataclass(frozen=True, kw_only=True)
class CachePlaceOptions(OptionGroup):
    """Where caches are, and in which precision."""

    cache_directory: Path | None = option(
        None, "folder of the caches; default: .flow-cache beside the pictures (a subset's own wins)"
    )
    cache_dtype: str = option(
        "bf16", "precision of cached latents and text features", choices=("bf16", "fp32")
    )


@dataclass(frozen=True, kw_only=True)
class LatentPassOptions(CachePlaceOptions):
    """Making the latent cache."""

    vae_batch_size: int = option(1, "pictures that go through the autoencoder together")
    vae_torch_compile: bool = option(
        False,
        "compile the autoencoder that fills the latent cache; takes a while, and can pay for thousands of "
        "pictures",
    )

    def __post_init__(self) -> None:
        _require_positive("vae_batch_size", self.vae_batch_size)


@dataclass(frozen=True, kw_only=True)
class TextPassOptions(CachePlaceOptions):
    """Making the text cache."""

    text_encoder_batch_size: int = option(8, "captions that go through the text encoder together")
    max_caption_variants: int = option(
        DEFAULT_MAX_VARIANTS,
        "texts kept for a picture whose caption is shuffled, dropped or drawn; more are sampled down to this",
    )

    def __post_init__(self) -> None:
        _require_positive("text_encoder_batch_size", self.text_encoder_batch_size)
        _require_positive("max_caption_variants", self.max_caption_variants)


@dataclass(frozen=True, kw_only=True)
class CachingOptions(LatentPassOptions, TextPassOptions):
    """Caches.

    Latents and text features are computed once and kept in memory, or with ..._to_disk in files that later
    runs find again. A changed picture, caption, option or model is noticed and encoded anew.
    """

    cache_latents: bool = option(False, "encode all pictures before training and keep the latents in memory")
    cache_latents_to_disk: bool = option(False, "keep the latents in files instead (implies --cache_latents)")
    cache_text_encoder_outputs: bool = option(
        False, "encode all captions before training and keep the features in memory"
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        False, "keep the features in files instead (implies --cache_text_encoder_outputs)"
    )

    skip_cache_check: bool = option(
        False,
        "take entries on disk for good if they are there, without looking at their bytes; each is still "
        "verified when training reads it",
        aliases=("skip_latents_validity_check",),
    )

    @property
    def latents(self) -> bool:
        """Whether latents are cached at all."""
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def texts(self) -> bool:
        """Whether text encoder outputs are cached at all."""
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk

    def with_implied(self) -> CachingOptions:
        """Return the options with what ..._to_disk implies."""
        return replace(self, cache_latents=self.latents, cache_text_encoder_outputs=self.texts)

    def __post_init__(self) -> None:
        LatentPassOptions.__post_init__(self)
        TextPassOptions.__post_init__(self)
        if not self.texts:
            self._refuse_changed(("max_caption_variants",), "--cache_text_encoder_outputs")
        if not (self.latents or self.texts):
            self._refuse_changed(
                ("cache_directory", "cache_dtype"), "--cache_latents or --cache_text_encoder_outputs"
            )

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag of a pass that is not made."""
        yield from super().adjustments()
        if not self.latents:
            reason = "it is about filling the latent cache, and --cache_latents is not given"
            yield from self.without_effect(("vae_batch_size", "vae_torch_compile"), reason)
        if not self.texts:
            reason = "it is about filling the text cache, and --cache_text_encoder_outputs is not given"
            yield from self.without_effect(("text_encoder_batch_size",), reason)
        if not (self.cache_latents_to_disk or self.cache_text_encoder_outputs_to_disk):
            reason = "no cache is kept on disk (--cache_latents_to_disk, ..._outputs_to_disk)"
            yield from self.without_effect(("skip_cache_check",), reason)

    def _refuse_changed(self, names: tuple[str, ...], needed: str) -> None:
        for field in fields(self):
            if field.name in names and getattr(self, field.name) != field.default:
                raise ConfigError(f"--{field.name} has no effect without {needed}; add that or leave it out.")


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"--{name} is {value}; it must be 1 or more.")
