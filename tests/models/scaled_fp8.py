"""Weight files in fp8 with scales, as ComfyUI has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

LARGEST = 448.0  # of float8_e4m3fn


def in_scaled_fp8(
    tensors: Mapping[str, Tensor], chosen: Callable[[str], bool], *, newer: bool = False, rows: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of such a file, and those of the file in fp32 that says the same.

    Args:
        chosen: which of the weights are in fp8. newer: with the newer names. rows: a scale for each row.
    """
    stored, plain = dict(tensors), dict(tensors)
    for name in filter(chosen, tensors):
        layer, weight = name.removesuffix(".weight"), tensors[name].float()
        scale = (weight.abs().amax(1, keepdim=True) if rows else weight.abs().max()) / LARGEST
        stored[name] = (weight / scale).to(torch.float8_e4m3fn)
        stored[f"{layer}.{'weight_scale' if newer else 'scale_weight'}"] = scale
        stored[f"{layer}.{'input_scale' if newer else 'scale_input'}"] = torch.ones(())
        if newer:
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}')).byte()
        plain[name] = stored[name].float() * scale
    if not newer:
        stored["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return stored, plain
