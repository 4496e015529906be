"""The kinds of LyCORIS networks: what each trains of a linear layer, and how that changes the layer's weight.

    kind       its change of the weight W (O, I)          tensors of the file
    lora       s up down                                  lora_up (O, R), lora_down (R, I)
    loha       s (w1_a w1_b) * (w2_a w2_b)                hada_w1_a, _w2_a (O, R), hada_w1_b, _w2_b (R, I)
    lokr       s kron(w1, w2)                             lokr_w1, lokr_w2, or each as a product: _a, _b
    full       diff, and diff_b of the bias               diff (O, I), diff_b (O,)
    ia3        each row of W, or column, times a number   weight (O,) or (I,), on_input
    diag-oft   R'W - W, R block-diagonal and orthogonal   oft_blocks (K, B, B), rescale (O, 1)
    boft       R_M ... R_1 W - W, each R_m such a matrix  oft_blocks (M, K, B, B), rescale (O, 1)
               on features in butterfly order

with s = alpha / R, and 1 for a lokr of two whole matrices. `dora_scale` makes the first three m V / |V| - W,
where V is W with the change and |V| its length row by row (m is (O, 1)) or column by column (m is (1, I)).

Notable facts:
- Names, shapes and formulas are those of the lycoris-lora package, against which tests hold them. Unlike
  there, a change is added to the layer's output instead of to its weight, where what is small beside W would
  be lost to bf16; and strength means the same for all kinds but boft: it multiplies the change.
- boft with a strength pulls each R_m towards the identity, as the package and ComfyUI do.

Shape legend: O out features, I in features, R rank, K blocks of B features, M stages.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]  # by their names in files, without ".weight"
_EPSILON = torch.finfo(torch.float32).eps  # added to lengths by LyCORIS and ComfyUI


@dataclass(frozen=True)
class Settings:
    """What a file says beside trained tensors.

    alpha: None for R; of rotations, how far they may go. on_input: an ia3 is of what a layer takes in.
    """

    alpha: float | None = None
    on_input: bool = False


class Kind(ABC):
    """One kind. `factors` are the tensors whose product is the change, or says its size.

    A tensor of `starts` begins with random numbers, and one of `closed` too where a trained `scalar`, which
    begins at zero, keeps the network without effect; all others begin so that there is none.
    """

    factors: tuple[str, ...]
    starts: Mapping[str, float | None] = {}  # standard deviation; None for uniform in +-1/sqrt(columns)
    closed: Mapping[str, float | None] = {}
    dora = False  # whether it may have a `dora_scale`
    linear = False  # whether its change is the same whatever the weight

    def rank(self, tensors: Tensors) -> int | None:
        """Return R, by which alpha is divided; None where alpha has no say."""
        return None

    def scale(self, tensors: Tensors, settings: Settings) -> float:
        """Return s."""
        rank = self.rank(tensors)
        return settings.alpha / rank if rank and settings.alpha is not None else 1.0

    @abstractmethod
    def product(self, tensors: Tensors, settings: Settings) -> Tensor:
        """Return what `--scale_weight_norms` limits: the change itself, where the kind is linear."""

    def change(self, tensors: Tensors, weight_OI: Tensor, settings: Settings, strength: float) -> Tensor:
        """Return the change of the weight, (O, I) fp32, differentiable in `tensors`."""
        product_OI = self.product(tensors, settings)
        if "dora_scale" not in tensors:
            return product_OI if strength == 1 else strength * product_OI
        return strength * dora_change(weight_OI, product_OI, tensors["dora_scale"])


class LoRAKind(Kind):
    """Two thin matrices."""

    factors = ("lora_up", "lora_down")
    starts = {"lora_down": None}
    closed = {"lora_up": None}
    dora = linear = True

    def rank(self, tensors: Tensors) -> int:
        return len(tensors["lora_down"])

    def product(self, tensors: Tensors, settings: Settings) -> Tensor:
        return self.scale(tensors, settings) * (_scaled(tensors, "lora_up") @ tensors["lora_down"])


class LohaKind(Kind):
    """The entrywise product of two products."""

    factors = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    starts = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_b": 1.0}
    closed = {"hada_w2_a": 0.1}
    dora = linear = True

    def rank(self, tensors: Tensors) -> int:
        return len(tensors["hada_w1_b"])

    def product(self, tensors: Tensors, settings: Settings) -> Tensor:
        first = _scaled(tensors, "hada_w1_a") @ tensors["hada_w1_b"]
        return self.scale(tensors, settings) * first * (tensors["hada_w2_a"] @ tensors["hada_w2_b"])


class LokrKind(Kind):
    """The Kronecker product of two matrices."""

    factors = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    starts = {"lokr_w1": None, "lokr_w1_a": None, "lokr_w1_b": None, "lokr_w2_a": None}
    closed = {"lokr_w2": None, "lokr_w2_b": None}
    dora = linear = True

    def rank(self, tensors: Tensors) -> int | None:
        for name in ("lokr_w2_b", "lokr_w1_b"):
            if name in tensors:
                return len(tensors[name])
        return None

    def both(self, tensors: Tensors, settings: Settings) -> tuple[Tensor, Tensor]:
        """Return w1 with the scale in it, and w2."""
        if "lokr_w1" in tensors:
            w1 = _scaled(tensors, "lokr_w1")
        else:
            w1 = _scaled(tensors, "lokr_w1_a") @ tensors["lokr_w1_b"]
        w2 = tensors["lokr_w2"] if "lokr_w2" in tensors else tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
        return self.scale(tensors, settings) * w1, w2

    def product(self, tensors: Tensors, settings: Settings) -> Tensor:
        return torch.kron(*self.both(tensors, settings))


class FullKind(Kind):
    """The change itself, and that of the bias."""

    factors = ("diff", "diff_b")
    linear = True

    def product(self, tensors: Tensors, settings: Settings) -> Tensor:
        return tensors["diff"]


class IA3Kind(Kind):
    """Numbers that scale what a layer puts out, or takes in."""

    factors = ("weight",)

    def product(self, tensors: Tensors, settings: Settings) -> Tensor:
        return tensors["weight"]

    def change(self, tensors: Tensors, weight_OI: Tensor, settings: Settings, strength: float) -> Tensor:
        numbers = strength * tensors["weight"]
        return weight_OI * (numbers if settings.on_input else numbers[:, None])


class DiagOFTKind(Kind):
    """A rotation within blocks of features."""

    factors = ("oft_blocks",)

    def product(self, tensors: Tensors, settings: Settings) -> Tensor:
        return tensors["oft_blocks"]

    def change(self, tensors: Tensors, weight_OI: Tensor, settings: Settings, strength: float) -> Tensor:
        rotation_KBB = cayley(tensors["oft_blocks"], _constraint(settings, weight_OI))
        blocks, size, _ = rotation_KBB.shape
        turned_KBI = rotation_KBB.transpose(1, 2) @ weight_OI.reshape(blocks, size, -1)
        turned_OI = turned_KBI.reshape_as(weight_OI)
        return strength * (turned_OI * tensors.get("rescale", 1.0) - weight_OI)


class BOFTKind(Kind):
    """Rotations within blocks of features, one after the other, each on features in another order."""

    factors = ("oft_blocks",)

    def product(self, tensors: Tensors, settings: Settings) -> Tensor:
        return tensors["oft_blocks"]

    def change(self, tensors: Tensors, weight_OI: Tensor, settings: Settings, strength: float) -> Tensor:
        rotations_MKBB = cayley(tensors["oft_blocks"], _constraint(settings, weight_OI))
        stages, blocks, size, _ = rotations_MKBB.shape
        if strength != 1:
            identity = torch.eye(size, device=weight_OI.device)
            rotations_MKBB = torch.lerp(identity.expand_as(rotations_MKBB), rotations_MKBB, strength)
        turned_OI = weight_OI
        for stage in range(stages):
            reach = 2**stage * size // 2  # features that turn with each other are so far apart
            mixed = turned_OI.reshape(-1, 2, reach, weight_OI.shape[1]).transpose(1, 2)
            mixed = rotations_MKBB[stage] @ mixed.reshape(blocks, size, -1)
            turned_OI = mixed.reshape(-1, reach, 2, weight_OI.shape[1]).transpose(1, 2)
        return turned_OI.reshape_as(weight_OI) * tensors.get("rescale", 1.0) - weight_OI


KINDS: Mapping[str, Kind] = {
    "lora": LoRAKind(),
    "loha": LohaKind(),
    "lokr": LokrKind(),
    "full": FullKind(),
    "ia3": IA3Kind(),
    "diag-oft": DiagOFTKind(),
    "boft": BOFTKind(),
}


def dora_change(weight_OI: Tensor, product_OI: Tensor, dora_scale: Tensor) -> Tensor:
    """Return m V / |V| - W for V = W + product; m is (O, 1) or (1, I)."""
    changed_OI = weight_OI + product_OI
    length = torch.linalg.vector_norm(changed_OI, dim=_across(dora_scale), keepdim=True) + _EPSILON
    return changed_OI * (dora_scale / length) - weight_OI


def lengths(weight_OI: Tensor, dora_scale: Tensor) -> Tensor:
    """Return the lengths of a weight's rows or columns, of the shape of `dora_scale`."""
    return torch.linalg.vector_norm(weight_OI.float(), dim=_across(dora_scale), keepdim=True)


def cayley(blocks: Tensor, constraint: float) -> Tensor:
    """Return the rotations (I + Q) (I - Q)^-1 with Q = blocks - blocks', (..., B, B).

    Above 0, `constraint` is the largest length that all Q together may have; longer ones are shortened.
    """
    skew = (blocks - blocks.transpose(-1, -2)).float()  # as solving needs it, with --full_bf16 too
    if constraint > 0:
        skew = skew * (constraint / (torch.linalg.vector_norm(skew) + 1e-8)).clamp(max=1)
    identity = torch.eye(blocks.shape[-1], device=skew.device)
    # Both factors commute. The first is never singular, and `solve` would make a GPU's queue wait to see so.
    return torch.linalg.solve_ex(identity - skew, identity + skew).result


def uniform_bound(shape: tuple[int, ...]) -> float:
    """Return the bound of the uniform start weights of a matrix: kaiming's for a = sqrt(5)."""
    return 1 / math.sqrt(shape[1])


def _constraint(settings: Settings, weight_OI: Tensor) -> float:
    """Return what `alpha` means for rotations: it is per output feature."""
    return (settings.alpha or 0.0) * len(weight_OI)


def _across(dora_scale: Tensor) -> int:
    return 1 if dora_scale.shape[1] == 1 else 0


def _scaled(tensors: Tensors, name: str) -> Tensor:
    return tensors[name] * tensors["scalar"] if "scalar" in tensors else tensors[name]
