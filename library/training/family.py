"""What shared code must know of a model family, as data."""

from __future__ import annotations

from dataclasses import dataclass, field

from library.data.items import Size


@dataclass(frozen=True)
class FamilySpec:
    """Constants of a family.

    `pixel_stride` divides every picture side; `latent_stride` pixels are one latent.
    """

    name: str
    architecture: str
    implementation: str
    latent_channels: int
    latent_stride: int
    patch: int

    @property
    def pixel_stride(self) -> int:
        """Pixels along one side of a token."""
        return self.latent_stride * self.patch

    def image_tokens(self, size: Size) -> int:
        """Return how many tokens a picture of a size in pixels has."""
        width, height = size
        return (width // self.pixel_stride) * (height // self.pixel_stride)


@dataclass(frozen=True)
class ModelFiles:
    """What weight files were found and what identifies them.

    `described` goes into the metadata of the saved network (key without `ss_` -> value).

    `trained_on` and `read_by` are digests of the files' content, by flag: of the models that the network is
    trained on, and of those that only read pictures and texts for it.
    """

    described: dict[str, str] = field(default_factory=dict)
    trained_on: dict[str, str] = field(default_factory=dict)
    read_by: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheIdentities:
    """Everything that cached latents and text features depend on besides the picture or text, as texts.

    A changed file or setting changes them. None: there is no such cache.
    """

    latents: str | None = None
    texts: str | None = None
