"""One prompt as a text encoder takes it: a text, and the picture it speaks of if there is one. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.data.items import DrawKey, Geometry, Size


@dataclass(frozen=True)
class SourcePicture:
    """A picture that is edited. It is cut to the size of the picture that is made of it.

    digest: SHA-256 of the file's bytes. interpolation: how it is resized, as in a dataset's options. size:
    the file's, after orientation; None if nobody knows. colours: the draw whose change of colours it shares.
    """

    path: Path
    geometry: Geometry
    digest: str
    interpolation: str | None = None
    flipped: bool = False
    size: Size | None = None
    colours: DrawKey | None = None

    @property
    def identity(self) -> str:
        """Everything that decides its pixels, as a text; where it lies and what it is called do not."""
        geometry = self.geometry
        numbers = (*geometry.resized, *geometry.crop, *geometry.bucket)
        drawn = f"flipped={self.flipped}" + (f" colours={self.colours}" if self.colours else "")
        return f"{self.digest} {' '.join(map(str, numbers))} {self.interpolation} {drawn}"


@dataclass(frozen=True)
class Prompt:
    """What a text encoder is given. `text`: after `NetworkTrainer.format_prompt`."""

    text: str
    source: SourcePicture | None = None
