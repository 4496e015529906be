"""What reaches the model: text conditions and batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from library.data.items import Draw
from library.data.prompt import SourcePicture


@dataclass(frozen=True)
class Condition:
    """One prompt as the model takes it, unpadded.

    tokens_LD: text features, one row a token. pooled_D: a pooled vector, for families that have one.
    source_Chw: scaled latents of the picture that is edited, as large as those of the picture that is made of
    it; None where a picture is made from the text alone.
    """

    tokens_LD: Tensor
    pooled_D: Tensor | None = None
    source_Chw: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """Return the condition with `function` done to each of its tensors."""
        return Condition(*(_mapped(getattr(self, f.name), function) for f in fields(self)))

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the text's features as named tensors for a cache file; latents have files of their own."""
        return {"tokens": self.tokens_LD} | ({} if self.pooled_D is None else {"pooled": self.pooled_D})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Condition:
        """Rebuild a condition from a cache file's tensors."""
        return cls(tensors["tokens"], tensors.get("pooled"))


@dataclass(frozen=True)
class Batch:
    """One process's part of a micro-batch. Either `latents` or `pixels`; `conditions` or only `captions`.

    Pictures of a batch may differ in size, so whatever has a size is a tuple with one tensor a picture:
    `latents` (C, h, w) and `noise` (C, h, w) in fp32, `pixels` (3, H, W) in [-1, 1], `masks` (h, w) in 0..1,
    None when no picture of the batch has one. weights_B weighs each picture's loss. `names` are the pictures'
    paths, for messages.

    Where pictures are edits, `sources` are what they are edits of, as text encoders take it, and
    `source_latents` or `source_pixels` are that as the model takes it; None for a picture without one, and
    () or None when no picture of the batch has one.

    Noise is made ahead, see `library.training.noising`. `sigmas` are those of sigma_B. Where latents are
    there, `noisy` is what the model is given of them, and `targets` the velocities that it should predict.
    Otherwise there is the `noise` that they will have, where it does not hang on them, and `perturbation`,
    which the input has in noise beyond what the target tells. `walks` are drawn with sigma, see
    `library.training.rollout`; () where no picture can have one.

    `kept`: of each route of --tread_routes, of each picture, the numbers of the tokens that take part; ()
    where all of them do.
    """

    draws: tuple[Draw, ...]
    names: tuple[str, ...]
    captions: tuple[str, ...]
    weights_B: Tensor
    latents: tuple[Tensor, ...] | None = None
    pixels: tuple[Tensor, ...] | None = None
    conditions: tuple[Condition, ...] | None = None
    masks: tuple[Tensor, ...] | None = None
    sources: tuple[SourcePicture | None, ...] = ()
    source_latents: tuple[Tensor | None, ...] | None = None
    source_pixels: tuple[Tensor | None, ...] | None = None
    network_multiplier: float = 1.0
    preserved: tuple[bool, ...] = ()
    sigmas: tuple[float, ...] = ()
    sigma_B: Tensor | None = None
    walks: tuple[tuple[float, ...], ...] = ()
    noisy: tuple[Tensor, ...] | None = None
    targets: tuple[Tensor, ...] | None = None
    noise: tuple[Tensor, ...] | None = None
    perturbation: tuple[Tensor, ...] | None = None
    kept: tuple[tuple[Tensor, ...], ...] = ()

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with `function` done to each of its tensors."""
        return replace(self, **{f.name: _mapped(getattr(self, f.name), function) for f in fields(self)})


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Condition):
        return value.map(function)
    if isinstance(value, tuple):
        return tuple(_mapped(each, function) for each in value)
    return value
