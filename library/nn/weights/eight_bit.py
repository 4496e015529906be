"""Products of matrices in 8 bits, where the device multiplies so: twice as fast as in bf16, or more. Around
the product its factor and its result are read and written some times, which that has to outweigh.

The codes of a quantised weight are one factor as they are. The other one, activations or the gradient of the
output, is quantised on the spot, row by row, so that a row's largest number is the code's largest. The
products are added up in 32 bits and scaled:

    y_ni = (sum_o codes(x)_no codes(W)_io) scale(x)_n scale(W)_i

Backward multiplies the gradient with the same codes. The weight's scales, one for each of its rows, then
belong to the columns of the gradient, which takes them up before it is quantised. That training bears this is
known from SwitchBack, https://arxiv.org/abs/2304.13013.

int8 is exact but for rounding both factors to 127 steps; fp8 rounds each number to 3 bits of mantissa.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from library.core.errors import ConfigError
from library.nn.stand_in import device_kind

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max}
_CAPABILITY = {"int8": (8, 0), "fp8": (8, 9)}  # from which NVIDIA's cards multiply so: Ampere, Ada
_FEWEST_ROWS = 17  # cuBLAS takes no fewer
_MULTIPLE = 16  # of widths that its kernels can take
_TINY = 1e-30  # in place of the largest number of a row of zeros; gradients can be very small


def check_device(scheme: str, device: torch.device) -> None:
    """Raise ConfigError if a device does not multiply codes of this scheme."""
    if device.type in ("cpu", "meta"):
        return
    way_out = "leave out --quant_matmul: the weights are then restored for each product."
    if device.type != "cuda" or torch.version.hip:
        raise ConfigError(f"--quant_matmul needs an NVIDIA GPU (or the CPU), and this is {device}; {way_out}")
    has, needs = torch.cuda.get_device_capability(device), _CAPABILITY[scheme]
    if has < needs:
        other = " --base_quant int8 needs 8.0 only; or" if scheme == "fp8" and has >= (8, 0) else ""
        raise ConfigError(
            f"--quant_matmul with {scheme} needs compute capability {needs[0]}.{needs[1]}, and "
            f"{torch.cuda.get_device_name(device)} has {has[0]}.{has[1]};{other} {way_out}"
        )


def suits_widths(*widths: int) -> bool:
    """Whether kernels can multiply with a weight of these widths, in both directions."""
    return all(width % _MULTIPLE == 0 for width in widths)


def suits_rows(rows: int) -> bool:
    """Whether kernels can multiply so many rows."""
    return rows >= _FEWEST_ROWS


def times_codes(x_NK: Tensor, codes_MK: Tensor) -> Tensor:
    """Return x times the transposed codes, (N, M) in fp32; x is rounded to the kind of the codes."""
    largest = _LARGEST[codes_MK.dtype]
    largest_N1 = torch.linalg.vector_norm(x_NK, torch.inf, 1, keepdim=True)
    scale_N1 = largest_N1.float().clamp_min(_TINY) / largest
    rounded_NK = x_NK / scale_N1  # in fp32, as the scale
    if codes_MK.dtype == torch.int8:
        return torch._int_mm(rounded_NK.round_().to(torch.int8), codes_MK.t()) * scale_N1
    # A division can end just above the largest number, which would become NaN.
    rounded_NK.clamp_(-largest, largest)
    return _fp8_product(rounded_NK.to(torch.float8_e4m3fn), codes_MK).mul_(scale_N1)


def _fp8_product(x_NK: Tensor, codes_MK: Tensor) -> Tensor:
    """Return the sums of products in fp32. On a CPU both factors are widened, which changes none of them:
    there torch's operation can take a thousand times as long (on those with AMX, with torch 2.13)."""
    if device_kind(x_NK) == "cpu":
        return F.linear(x_NK.float(), codes_MK.float())
    one = torch.ones((), device=x_NK.device)
    return torch._scaled_mm(x_NK, codes_MK.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)


def multiply(x_NI: Tensor, codes_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """Return x times the transposed weight, (N, O) in fp32."""
    return times_codes(x_NI, codes_OI).mul_(scale_O1.t())


def multiply_back(grad_NO: Tensor, codes_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """Return the gradient times the weight, (N, I) in fp32."""
    # The kernels want both factors with the summed dimension last in memory.
    return times_codes(grad_NO * scale_O1.t(), codes_OI.t().contiguous())
