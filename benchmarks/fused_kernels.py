"""Do our Triton kernels pay? Each memory-bound part of a block, with `--fused_kernels torch` and `triton`.

    python benchmarks/fused_kernels.py                      # bf16, the widths of Lumina 2
    python benchmarks/fused_kernels.py --family kandinsky5 --compile
    python benchmarks/fused_kernels.py --dtype fp32 --tokens 4096 --json kernels.json

NVIDIA GPUs only. GPU time of a call, median, with cold caches; GB/s are the bytes of inputs and results that
must be moved at the least, over that time. `off` is how far the results of both are apart, values and
gradients, relative; rounding in other places makes that about 0.005 in bf16. With --compile a third one takes
part: the plain functions, compiled by `torch.compile`. Modulation learns, so gains and gates get gradients.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from library.core.device import dtype_named  # noqa: E402
from library.core.errors import UserError  # noqa: E402
from library.models.kandinsky5_format import Kandinsky5Params  # noqa: E402
from library.models.lumina2_format import NextDiTParams  # noqa: E402
from library.nn import (
    activations,
    layers,
    modulated,  # noqa: E402
)
from library.nn.kernels import replace_parts  # noqa: E402
from library.nn.packing import Packing  # noqa: E402
from library.nn.triton_kernels.choice import use_fused_kernels  # noqa: E402

SAMPLES = 4
Bench = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Part:
    """A part of a block, with its inputs: `function(*inputs)`; all of them get gradients."""

    name: str
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Figure:
    """One row of the table. ms: of a call. least_mb: what it must move. off: see the module's docstring."""

    part: str
    way: str
    contestant: str
    ms: float
    least_mb: float
    off: float

    @property
    def gb_per_s(self) -> float:
        """Least bytes over time."""
        return self.least_mb / self.ms


def lumina2(tokens: int, dtype: torch.dtype, device: torch.device) -> Iterator[Part]:
    """The parts of a block of Lumina 2."""
    params, draw, packing = NextDiTParams(), _Draw(device), _packing(tokens, device)
    eps, dim = params.norm_eps, params.dim
    x, stream, gain = draw(tokens, dim, dtype), draw(tokens, dim, dtype), draw(SAMPLES, dim)
    yield Part("rms norm, scaled", lambda x, g: layers.scaled_rms_norm(x, g, packing, eps), (x, gain))
    yield Part(
        "stream + gated norm",
        lambda s, x, g: layers.normed_residual(s, x, g, packing, eps),
        (stream, x, gain),
    )
    yield _heads(draw, (tokens, params.n_heads + params.n_kv_heads, params.head_dim), dtype)
    wide = (draw(tokens, params.ffn_dim, dtype), draw(tokens, params.ffn_dim, dtype))
    yield Part("SwiGLU", activations.swiglu, wide)


def kandinsky5(tokens: int, dtype: torch.dtype, device: torch.device) -> Iterator[Part]:
    """The parts of a block of Kandinsky 5."""
    params, draw, packing = Kandinsky5Params(), _Draw(device), _packing(tokens, device)
    dim = params.model_dim
    x, stream = draw(tokens, dim, dtype), draw(tokens, dim, dtype)
    gain, shift = draw(SAMPLES, dim), draw(SAMPLES, dim)
    yield Part(
        "layer norm, modulated",
        lambda x, g, s: modulated.modulated_layer_norm(x, g, s, packing, 1e-5),
        (x, gain, shift),
    )
    yield Part(
        "stream + gate * x", lambda s, x, g: modulated.gated_residual(s, x, g, packing), (stream, x, gain)
    )
    yield _heads(draw, (tokens, dim // params.head_dim, params.head_dim), dtype)


FAMILIES = {"lumina2": lumina2, "kandinsky5": kandinsky5}


class _Draw:
    """Random leaves, always the same ones."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._generator = device, torch.Generator(device).manual_seed(0)

    def __call__(self, rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        drawn = torch.randn(rows, width, generator=self._generator, device=self._device)
        return drawn.to(dtype).requires_grad_()


def _packing(tokens: int, device: torch.device) -> Packing:
    return Packing.of([tokens // SAMPLES] * SAMPLES, device)


def _heads(draw: _Draw, shape: tuple[int, int, int], dtype: torch.dtype) -> Part:
    tokens, heads, width = shape
    gain = draw(heads, width)
    table = draw(tokens, width).detach().unflatten(1, (-1, 2))

    def function(x: Tensor, gain: Tensor) -> Tensor:
        return layers.norm_and_rotate(x.unflatten(1, (heads, width)), gain, table, 1e-6)

    return Part("heads: norm, rotate", function, (draw(tokens, heads * width, dtype), gain))


def measure(part: Part, contestants: tuple[str, ...], device: torch.device, bench: Bench) -> Iterator[Figure]:
    """Measure one part, forward and backward, with each contestant."""
    expected: list[Tensor] = []
    for contestant in contestants:
        replace_parts("triton" if contestant == "triton" else "torch")
        function = torch.compile(part.function) if contestant == "compiled" else part.function
        output = function(*part.inputs)
        grad = torch.ones_like(output) + output.detach()

        def backward(output: Tensor = output, grad: Tensor = grad) -> tuple[Tensor, ...]:
            return torch.autograd.grad(output, part.inputs, grad, retain_graph=True)

        found = [output.detach(), *backward()]
        expected = expected or found
        off = max(_distance(*pair) for pair in zip(found, expected, strict=True))
        one_way = _bytes(*part.inputs, output)
        ms = bench(lambda function=function: function(*part.inputs))
        yield Figure(part.name, "forward", contestant, ms, one_way / 1e6, off)
        pairs = zip(part.inputs, found[1:], strict=True)  # a stream's gradient is passed on as it is
        moved = [tensor for pair in pairs if pair[1].data_ptr() != grad.data_ptr() for tensor in pair]
        yield Figure(part.name, "backward", contestant, bench(backward), _bytes(grad, *moved) / 1e6, off)
    replace_parts("torch")


def _distance(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def show(figures: list[Figure]) -> None:
    """Print a table; ratios are to the first contestant."""
    print("| part | way | | ms | ratio | GB/s | off |\n| --- | --- | --- | --- | --- | --- | --- |")
    first = {}
    for each in figures:
        base = first.setdefault((each.part, each.way), each.ms)
        print(
            f"| {each.part} | {each.way} | {each.contestant} | {each.ms:.3f} | {each.ms / base:.3f} "
            f"| {each.gb_per_s:.0f} | {each.off:.1g} |"
        )


def main() -> int:
    """Measure every part of a family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="lumina2")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--tokens", type=int, default=16384, help="of the four samples together")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile, too")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        use_fused_kernels("triton", device, dtype_named(args.dtype))
    except UserError as error:
        print(f"Nothing to measure here: {error}", file=sys.stderr)
        return error.exit_code
    from triton.testing import do_bench

    contestants = ("torch", "triton", "compiled") if args.compile else ("torch", "triton")
    figures = [
        figure
        for part in FAMILIES[args.family](args.tokens, dtype_named(args.dtype), device)
        for figure in measure(part, contestants, device, lambda call: do_bench(call, return_mode="median"))
    ]
    print(f"{torch.cuda.get_device_name(device)}, {args.family}, {args.dtype}, {args.tokens} tokens\n")
    show(figures)
    if args.json is not None:
        rows = [asdict(figure) for figure in figures]
        args.json.write_text(
            json.dumps({"device": torch.cuda.get_device_name(device), "rows": rows}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
