"""The weights that a LoRA starts from, by the names that peft has for them (`init_lora_weights`).

    kaiming          down uniform in +-1/sqrt(in), up zero: kohya's, and the default
    gaussian         down normal with deviation 1 / rank, up zero
    pissa            the largest singular values of the layer's weight, shared out equally (arXiv 2404.02948)
    pissa_niter_N    the same by N rounds of subspace iteration: near, and much faster on large layers
    olora            the first columns of Q and rows of R of the weight's QR decomposition (arXiv 2406.01775)

The last three start from a part of the weight itself; see `networks/layer.py` for how a LoRA then has no
effect at first.

Shape legend: I in features, O out features, R rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from networks.names import is_anchored

_EXTRA = 8  # columns beyond the rank in subspace iteration, which make the last singular vectors good


def start_weights(
    kind: str, weight_OI: Tensor, rank: int, strength: float, draws: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return down (R, I) and up (O, R), fp32.

    Args:
        kind: a name from the table above. strength: alpha / rank, by which `up down` will be multiplied.
        draws: what random numbers are taken from, on the CPU.
    """
    out_features, in_features = weight_OI.shape
    if is_anchored(kind):
        return _from_weight(kind, weight_OI.float(), rank, strength, draws)
    down = torch.empty(rank, in_features)
    if kind == "gaussian":
        nn.init.normal_(down, std=1 / rank, generator=draws)
    else:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=draws)
    return down, torch.zeros(out_features, rank)


def _from_weight(
    kind: str, weight_OI: Tensor, rank: int, strength: float, draws: torch.Generator
) -> tuple[Tensor, Tensor]:
    if kind == "olora":
        q, r = torch.linalg.qr(weight_OI)
        return r[:rank], q[:, :rank]
    _, _, rounds = kind.partition("_niter_")
    if rounds:
        left, values, right = _largest_singular(weight_OI, rank, int(rounds), draws)
    else:
        left, values, right = torch.linalg.svd(weight_OI, full_matrices=False)
    roots = (values[:rank] / strength).sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


def _largest_singular(
    weight_OI: Tensor, count: int, rounds: int, draws: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S, V' of about the `count` largest singular values (Halko et al., arXiv 0909.4061, 4.4)."""
    out_features, in_features = weight_OI.shape
    width = min(count + _EXTRA, out_features, in_features)
    guess_IW = torch.randn(in_features, width, generator=draws).to(weight_OI.device)
    basis_OW = torch.linalg.qr(weight_OI @ guess_IW).Q
    for _ in range(rounds):
        basis_IW = torch.linalg.qr(weight_OI.t() @ basis_OW).Q
        basis_OW = torch.linalg.qr(weight_OI @ basis_IW).Q
    left, values, right = torch.linalg.svd(basis_OW.t() @ weight_OI, full_matrices=False)
    return basis_OW @ left, values, right
