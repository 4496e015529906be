"""Our Triton kernels beside the plain functions, on the machine at hand and with a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from library.nn.activations import plain_swiglu
from library.nn.layers import plain_norm_and_rotate, plain_normed_residual, plain_scaled_rms_norm
from library.nn.modulated import plain_gated_residual, plain_modulated_layer_norm
from library.nn.packing import Packing
from library.nn.triton_kernels import layers as by_rows
from library.nn.triton_kernels import modulated as by_samples

_LENGTHS = (21, 3)  # more tokens than a program takes, and fewer
# As wide as Lumina's, so several warps share a row, and no powers of two: a program has room left, which it
# must not use.
_WIDTH, _HEADS, _HEAD_WIDTH = 2304, 3, 96
_EPS = 1e-5
Function = Callable[..., Tensor]


def differing_parts(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the names of the parts whose kernels, in a dtype, find other results or gradients than torch
    does in fp32. Rounding is no difference."""
    draw = _Draw(device, dtype)
    names = list(dict.fromkeys(part.fused.__name__ for part in _parts(draw) if not part.agrees(draw)))
    return names if _swiglu_back_agrees(draw) else [*names, by_rows.swiglu_back.__name__]


class _Draw:
    """Draws tensors for a device, the same in each process."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, dtype or self.dtype)


@dataclass(frozen=True)
class _Part:
    """A kernel's function, the plain one, and what both are called with."""

    fused: Function
    plain: Function
    inputs: tuple[Tensor, ...]
    constants: tuple[object, ...]

    def agrees(self, draw: _Draw) -> bool:
        """Whether both return the same, and the same gradients of all inputs."""
        grad = draw(*self.inputs[0].shape)
        found = _both_ways(self.fused, self.inputs, self.constants, grad)
        exact = _both_ways(self.plain, _wide(self.inputs), self.constants, grad.float())
        return all(_close(*pair, draw.dtype) for pair in zip(found, exact, strict=True))


def _parts(draw: _Draw) -> list[_Part]:
    packing, tokens = Packing.of(_LENGTHS, draw.device), sum(_LENGTHS)
    x_TD, stream_TD = (draw(tokens, _WIDTH) for _ in range(2))
    gain_BD, shift_BD = (draw(len(_LENGTHS), _WIDTH, dtype=torch.float32) for _ in range(2))
    x_THF, gain_HF = draw(tokens, _HEADS, _HEAD_WIDTH), draw(_HEADS, _HEAD_WIDTH, dtype=torch.float32)
    table_TP2 = draw(tokens, _HEAD_WIDTH // 2, 2, dtype=torch.float32)
    norm, heads = (packing, _EPS), (table_TP2, _EPS)
    trained = [
        _Part(by_rows.scaled_rms_norm, plain_scaled_rms_norm, (x_TD, gain_BD), norm),
        _Part(by_rows.normed_residual, plain_normed_residual, (stream_TD, x_TD, gain_BD), norm),
        _Part(by_rows.norm_and_rotate, plain_norm_and_rotate, (x_THF, gain_HF), heads),
        _Part(by_rows.swiglu, plain_swiglu, (x_TD, stream_TD), ()),
        _Part(by_samples.modulated_layer_norm, plain_modulated_layer_norm, (x_TD, gain_BD, shift_BD), norm),
        _Part(by_samples.gated_residual, plain_gated_residual, (stream_TD, x_TD, gain_BD), (packing,)),
    ]
    # Gains that want no gradient, or are one for all samples, as in frozen models: these are other kernels.
    gain_1D, both = gain_BD[:1], (gain_BD, shift_BD)
    frozen = [
        _Part(by_rows.scaled_rms_norm, plain_scaled_rms_norm, (x_TD,), (gain_1D, *norm)),
        _Part(by_rows.normed_residual, plain_normed_residual, (stream_TD, x_TD), (gain_1D, *norm)),
        _Part(by_rows.norm_and_rotate, plain_norm_and_rotate, (x_THF,), (gain_HF, *heads)),
        _Part(by_rows.norm_and_rotate, plain_norm_and_rotate, (x_THF,), (gain_HF, None, _EPS)),
        _Part(by_samples.modulated_layer_norm, plain_modulated_layer_norm, (x_TD,), (*both, *norm)),
        _Part(by_samples.gated_residual, plain_gated_residual, (stream_TD, x_TD), (gain_BD, packing)),
    ]
    return trained + frozen


def _swiglu_back_agrees(draw: _Draw) -> bool:
    a_TF, b_TF, grad_TF = (draw(sum(_LENGTHS), _WIDTH) for _ in range(3))
    exact = _both_ways(plain_swiglu, _wide((a_TF, b_TF)), (), grad_TF.float())
    values: list[Tensor] = []
    grads = by_rows.swiglu_back((a_TF, b_TF), grad_TF, lambda y_TF, rows: values.append(y_TF[rows]))
    return all(_close(*pair, draw.dtype) for pair in zip((*values, *grads), exact, strict=True))


def _wide(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in inputs)


def _both_ways(
    function: Function, inputs: tuple[Tensor, ...], constants: tuple[object, ...], grad: Tensor
) -> tuple[Tensor, ...]:
    """Return the result and the gradients of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        result = function(*leaves, *constants)
    return result.detach(), *torch.autograd.grad(result, leaves, grad)


def _close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    far = (ours.float() - exact).norm() / exact.norm()
    return bool(far < max(1e-4, 8 * torch.finfo(dtype).eps))  # not so if either is NaN
