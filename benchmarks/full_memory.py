"""What full fine-tuning of the released models takes: GiB of tensors on the device and in the computer.

    python benchmarks/full_memory.py                       # both families, one picture of 1024x1024, bf16
    python benchmarks/full_memory.py --family lumina2 --checkpoint_mode offload

Computed and not measured: a step runs on torch's meta device, as on a GPU, and every tensor is followed from
when it is made until it is freed; what lies beside weights is told by letting the optimizer step small ones
on the CPU. The code is that of --dry_run. Caches, a driver's own memory and what allocators lose come on top.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from kandinsky5_train_network import KANDINSKY5  # noqa: E402
from library.core.errors import MissingPackageError  # noqa: E402
from library.data.batch import Condition  # noqa: E402
from library.models import kandinsky5, lumina2  # noqa: E402
from library.models.kandinsky5_dit import Kandinsky5DiT  # noqa: E402
from library.models.kandinsky5_format import Kandinsky5Params  # noqa: E402
from library.models.lumina2_format import NextDiTParams  # noqa: E402
from library.models.nextdit import NextDiT  # noqa: E402
from library.nn.running.runner import MODES  # noqa: E402
from library.nn.transformer import Transformer  # noqa: E402
from library.options.optimizer import OptimizerOptions  # noqa: E402
from library.options.swap import SwapOptions  # noqa: E402
from library.training.look.holdings import BlockWeights, Holdings, Sample, Upkeep  # noqa: E402
from library.training.look.simulate import META, Simulation, Step, Work  # noqa: E402
from library.training.optim.one_by_one import OneByOne  # noqa: E402
from library.training.optim.optimizer import create_optimizer  # noqa: E402
from library.training.trainee.whole_model import WholeModel  # noqa: E402
from lumina_train_network import LUMINA2  # noqa: E402

GIB = 2**30
# Optimizer, --full_bf16, --fused_backward_pass, share of blocks that are swapped.
WAYS = (
    ("AdamW", False, False, 0.0),
    ("AdamW", False, True, 0.0),
    ("AdamW8bit", False, True, 0.0),
    ("Adafactor", False, True, 0.0),
    ("AdamW8bit", True, True, 0.0),
    ("Adafactor", True, True, 0.0),
    ("AdamW", False, False, 0.5),
    ("AdamW", False, True, 0.5),
    ("Adafactor", False, True, 0.5),
    ("AdamW", False, True, 1.0),
    ("AdamW8bit", True, True, 1.0),
    ("Adafactor", True, True, 1.0),
)


def lumina_model() -> tuple[Transformer, object]:
    """Return Lumina Image 2.0 without content, and what a trainer knows of it."""
    params = NextDiTParams()
    with torch.device(META):
        model = NextDiT(params)
    return _loaded(model, "t_embedder."), _trainer(
        LUMINA2, lumina2.velocities, lambda tokens: (torch.empty(tokens, params.cap_feat_dim, device=META),)
    )


def kandinsky_model() -> tuple[Transformer, object]:
    """Return Kandinsky 5.0 Image Lite without content, and what a trainer knows of it."""
    params = Kandinsky5Params()
    with torch.device(META):
        model = Kandinsky5DiT(params)

    def features(tokens: int) -> tuple[Tensor, ...]:
        shapes = (tokens, params.text_dim), (params.pooled_dim,)
        return tuple(torch.empty(shape, device=META) for shape in shapes)

    return _loaded(model, "time_embeddings."), _trainer(KANDINSKY5, kandinsky5.velocities, features)


FAMILIES = {"lumina2": (lumina_model, 256), "kandinsky5": (kandinsky_model, 512)}  # and tokens of a caption


def main() -> None:
    """Print a table for each family."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", choices=list(FAMILIES))
    parser.add_argument("--checkpoint_mode", choices=MODES, default="full")
    parser.add_argument("--side", type=int, default=1024, help="of the picture, in pixels")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    for name in [arguments.family] if arguments.family else FAMILIES:
        make, tokens = FAMILIES[name]
        model, trainer = make()
        blocks = BlockWeights.of(model.runner.blocks)
        trainee = WholeModel(model)
        model.runner.keep(arguments.checkpoint_mode)
        work = Work(((arguments.side, arguments.side),), tokens)
        step = Simulation(trainer, model, trainee).step(work)
        print(f"{name}: {trainee.parameter_count() / 1e9:.2f} billion numbers, {len(blocks.sizes)} blocks")
        print(f"  {'optimizer':<11}{'weights':<11}{'fused':<7}{'swapped':>7}{'device':>9}{'computer':>10}")
        for way in WAYS:
            try:
                print(_row(step, trainee, blocks, way), flush=True)
            except MissingPackageError as error:
                print(f"  {way[0]:<11}not here: {error}")


def _row(step: Step, trainee: WholeModel, blocks: BlockWeights, way: tuple[str, bool, bool, float]) -> str:
    optimizer, full_bf16, fused, share = way

    def make(sample: Sample) -> torch.optim.Optimizer:
        options = OptimizerOptions(optimizer_type=optimizer)
        inner = create_optimizer(sample.parameter_groups(1e-5), options, lean=False)
        return OneByOne(inner, sample.named_parameters(), stochastic=full_bf16)

    def upkeep(dtype: torch.dtype) -> Upkeep:
        return Upkeep.of(make, dtype, torch.device("cpu"))

    holdings = Holdings(trainee.model, trainee, blocks, upkeep, in_backward=fused, several=False)
    swap = SwapOptions(blocks_to_swap=round(share * len(blocks.sizes)))
    device = sum(holdings.in_steps(step, swap).values())
    computer = sum(holdings.in_computer(swap).values())
    weights = "full_bf16" if full_bf16 else "bf16"
    return (
        f"  {optimizer:<11}{weights:<11}{'yes' if fused else 'no':<7}{swap.count:>7}"
        f"{device / GIB:>9.2f}{computer / GIB:>10.2f}"
    )


def _loaded(model: Transformer, in_fp32: str) -> Transformer:
    """Give the weights the types that they are loaded in."""
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(torch.float32 if name.startswith(in_fp32) else torch.bfloat16)
    model.requires_grad_(False)
    model.use_attention("auto")
    return model.eval()


def _trainer(
    family: object, velocities: Callable[..., object], features: Callable[[int], tuple[Tensor, ...]]
) -> object:
    return SimpleNamespace(
        family=family,
        options=SimpleNamespace(trainee=SimpleNamespace(trains_text_encoder=False)),
        velocities=velocities,
        blank_condition=lambda tokens, device: Condition(*features(tokens)),
    )


if __name__ == "__main__":
    main()
