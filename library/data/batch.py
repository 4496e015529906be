"""What reaches the model: text conditions and batches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from library.data.items import Draw


@dataclass(frozen=True)
class Condition:
    """One prompt as the model takes it, unpadded.

    tokens_LD: text features, one row a token. pooled_D: a pooled vector, for families that have one.
    """

    tokens_LD: Tensor
    pooled_D: Tensor | None = None

    def to_tensors(self) -> dict[str, Tensor]:
        """Return named tensors for a cache file."""
        return {"tokens": self.tokens_LD} | ({} if self.pooled_D is None else {"pooled": self.pooled_D})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Condition:
        """Rebuild a condition from a cache file's tensors."""
        return cls(tensors["tokens"], tensors.get("pooled"))


@dataclass(frozen=True)
class Batch:
    """One process's part of a micro-batch. Either `latents_BCHW` or `pixels_BCHW`; `conditions` or only
    `captions`.

    pixels_BCHW are in [-1, 1]. masks_B1HW (0..1, latent size) is None when no picture of the batch has a
    mask. weights_B weighs each picture's loss. `names` are the pictures' paths, for messages.
    """

    draws: tuple[Draw, ...]
    names: tuple[str, ...]
    captions: tuple[str, ...]
    weights_B: Tensor
    latents_BCHW: Tensor | None = None
    pixels_BCHW: Tensor | None = None
    conditions: tuple[Condition, ...] | None = None
    masks_B1HW: Tensor | None = None
    network_multiplier: float = 1.0
    preserved: tuple[bool, ...] = ()
