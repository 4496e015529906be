"""Peak memory of a step with gradient checkpointing, ours against the reference tool's arithmetic.

    python benchmarks/checkpointing_peak.py                # Lumina's real size, 1024 px, bf16
    python benchmarks/checkpointing_peak.py --size mid --dtype fp32

Nothing is computed: steps run on torch's meta device, as on a GPU, and every tensor is followed from when it
is made until it is freed. Weights are not counted. The reference gives SDPA a boolean mask over all heads and
queries, and SDPA makes numbers of it (measured on the CPU: as many as the mask has entries). "mask for
nothing" leaves these out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import reference_model  # noqa: E402
from benchmarks.step_lumina import SIZES  # noqa: E402
from benchmarks.step_parts import RANK  # noqa: E402
from library.models.lumina2_format import parameter_shapes  # noqa: E402
from library.models.nextdit import NextDiT  # noqa: E402
from library.nn.running.runner import MODES  # noqa: E402
from library.nn.stand_in import meta_standing_for  # noqa: E402
from library.training.look.meter import Meter  # noqa: E402
from networks.lora import LoRANetwork, LoRASize, linear_layers  # noqa: E402


def peak(step: Callable[[], Tensor], weights: Iterable[Tensor]) -> tuple[int, int]:
    """Return the most bytes of a step, and those between forward and backward."""
    meter = Meter()
    meter.ignore(weights)
    with meta_standing_for("cuda"), meter:
        loss = step()
        kept = meter.live
        loss.backward()
    return meter.peak, kept


def our_step(size: str, dtype: torch.dtype, mode: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return a step of this project, and its weights."""
    params = SIZES[size].params
    with torch.device("meta"):
        model = NextDiT(params).to(dtype).requires_grad_(False)
        model.t_embedder.float()
        targets = (path for path in linear_layers(model) if ".attention." in path or ".feed_forward." in path)
        network = LoRANetwork(model, {path: LoRASize(RANK, RANK) for path in targets})
        network.apply_to(model)
        inputs = _inputs(size, dtype)
    model.runner.keep(mode)
    return lambda: model(*inputs)[0].float().square().mean(), [*model.parameters(), *network.parameters()]


def reference_step(
    size: str, dtype: torch.dtype, *, checkpointing: bool
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return a step of the reference, and its weights."""
    params = SIZES[size].params
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in parameter_shapes(params)}
        model = reference_model.ReferenceModel(params, weights).requires_grad_(False)
        model.add_loras(RANK)
        inputs = _inputs(size, dtype)
    for name, weight in model.named_parameters():
        lora = name.endswith(("down.weight", "up.weight"))
        weight.requires_grad_(lora)
        weight.data = weight.data if lora or name.startswith("t_embedder.") else weight.data.to(dtype)
    model.t_embedder.mlp = nn.Sequential(model.t_embedder.mlp, _To(dtype))
    turns = torch.empty(1, params.head_dim // 2, dtype=torch.complex128, device="meta")
    model._turns = lambda length, rows, columns, longest, device: turns.expand(longest, -1)
    model.checkpointing = checkpointing
    x, t, captions = inputs
    return lambda: model(torch.stack(x), t, captions).float().square().mean(), [*model.parameters()]


def _inputs(size: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    params, latent, caption = SIZES[size].params, SIZES[size].latent, SIZES[size].caption
    x = torch.empty(params.in_channels, latent, latent, dtype=dtype)
    return [x], torch.empty(1), [torch.empty(caption, params.cap_feat_dim, dtype=dtype)]


class _To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def _stand_in(*, mask_costs: bool) -> None:
    """Let the reference do on the meta device what autocast and attention do on a GPU."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        bias = torch.empty(mask.shape, dtype=q.dtype, device="meta") if mask_costs else None
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]

    def lora(self: reference_model.LoRA, x: Tensor) -> Tensor:
        down, up = self.down.weight.to(x.dtype), self.up.weight.to(x.dtype)
        return self.base(x) + F.linear(F.linear(x, down), up) * self.multiplier * self.scale

    def turn(x: Tensor, turns: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns.unsqueeze(2)).flatten(3).type_as(x)

    named = {name: getattr(F, name) for name in ("silu", "layer_norm")}
    reference_model.F = SimpleNamespace(**named, scaled_dot_product_attention=attention)
    reference_model.LoRA.forward, reference_model._turn = lora, turn


def main() -> None:
    """Read the command line and count."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    given = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[given.dtype]
    print(
        f"{given.size}, {given.dtype}\n\n| | peak, MB | between forward and backward |\n| --- | --- | --- |"
    )
    for mode in MODES:
        _show(f"ours, {mode}", *peak(*our_step(given.size, dtype, mode)))
    for checkpointing in (True, False):
        for mask_costs in (True, False):
            _stand_in(mask_costs=mask_costs)
            found = peak(*reference_step(given.size, dtype, checkpointing=checkpointing))
            name = "reference" if checkpointing else "reference, no checkpointing"
            _show(name if mask_costs else f"{name}, mask for nothing", *found)


def _show(name: str, most: int, kept: int) -> None:
    print(f"| {name} | {most / 2**20:.0f} | {kept / 2**20:.0f} |")


if __name__ == "__main__":
    main()
