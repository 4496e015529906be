"""Blocks whose memory-bound parts Triton computes, as we wrote them or as torch's compiler did, compute what
they do without. Run on the pretended GPU by `test_pretended_gpu.py`; holds on a real one, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from library.models.flux_vae import FluxVAE
from library.models.flux_vae_format import FluxVAEParams
from library.nn.kernels import replace_parts
from library.nn.running.compiling import part_compiler
from library.nn.swap.block_swap import BlockSwap
from library.nn.triton_kernels.choice import use_fused_kernels
from library.options.compute import ComputeOptions
from networks.lora import LoRANetwork, LoRASize
from tests.nn.triton_in_interpreter import kandinsky, lumina, randomised, train

GPU = torch.device("cuda")
FAMILIES = pytest.mark.parametrize("make", [lumina, kandinsky])


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing replaced, and no graphs of other tests."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    replace_parts("torch")


class Contest:
    """A model with a LoRA on the GPU, and the step to take with it. `swapped`: blocks wait on the CPU."""

    def __init__(self, make: Callable[..., object], dtype: torch.dtype, swapped: bool = False) -> None:
        self._make = make
        self.model, paths, inputs = randomised(make, dtype)
        self.model.requires_grad_(False)
        blocks = self.model.runner.blocks if swapped else []
        waiting = {weight for block in blocks for weight in block.parameters()}
        self.model.runner.ring = BlockSwap(blocks, GPU, ring_size=1, pinned=True) if swapped else None
        self.network = LoRANetwork(self.model, {path: LoRASize(2, 2) for path in paths})
        self.network.apply_to(self.model)
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.normal_(std=0.1)
        for tensor in (*self.model.parameters(), *self.network.parameters(), *self.model.buffers()):
            if tensor not in waiting:
                tensor.data = tensor.to(GPU)
        self.network.train()
        self.inputs = on_gpu(inputs)

    def step(self) -> list[Tensor]:
        """Return the outputs and the gradients of a step."""
        return [x.clone() for x in train(self.model, self.network, self.inputs)]

    def step_in_fp32(self) -> list[Tensor]:
        """Return what `step` does, by a model of the same weights in fp32."""
        other = Contest(self._make, torch.float32)
        other.model.load_state_dict(self.model.state_dict())
        return other.step()


def on_gpu(inputs: object) -> object:
    """Return the inputs, lists of tensors among them, on the GPU."""
    if isinstance(inputs, Tensor):
        return inputs.to(GPU)
    return type(inputs)(on_gpu(x) for x in inputs)


def assert_as_exact(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """Ours, which are other bits than plain, are no farther from what is exact."""
    assert distance(ours, plain) > 0
    assert distance(ours, exact) < 1.5 * distance(plain, exact) + 1e-5


def distance(ours: list[Tensor], others: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, others, strict=True))


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_kernels(make: Callable[..., object], dtype: torch.dtype) -> None:
    """The same bits whatever is kept for backward, and with block swap."""
    contest = Contest(make, dtype)
    plain, exact = contest.step(), contest.step_in_fp32()
    use_fused_kernels("triton", GPU, dtype)
    fused = contest.step()
    assert_as_exact(fused, plain, exact)
    for mode in ("selective", "full"):
        contest.model.runner.keep(mode)
        assert distance(contest.step(), fused) == 0
    assert distance(Contest(make, dtype, swapped=True).step(), fused) == 0


@pytest.mark.parametrize(("make", "dtype"), [(lumina, torch.float32), (kandinsky, torch.bfloat16)])
def test_compiled_blocks(make: Callable[..., object], dtype: torch.dtype) -> None:
    """With the same graphs when blocks are checkpointed, or swapped."""
    contest, swapped = Contest(make, dtype), Contest(make, dtype, swapped=True)
    plain, exact = contest.step(), contest.step_in_fp32()
    for each in (contest, swapped):
        each.model.runner.compile(part_compiler(ComputeOptions(torch_compile=True)))
    compiled = contest.step()
    assert_as_exact(compiled, plain, exact)
    graphs = counters["stats"]["unique_graphs"]
    contest.model.runner.keep("full")
    assert distance(contest.step(), compiled) == 0
    assert distance(swapped.step(), compiled) == 0
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


def test_the_autoencoder() -> None:
    """In channels last, with one graph for all sizes of several pictures."""
    torch.manual_seed(0)
    vae = FluxVAE(FluxVAEParams(channels=(32, 32), blocks=1)).to(GPU, memory_format=torch.channels_last)

    def encode(pixels_BCHW: Tensor) -> Tensor:
        return vae.encode_mean(pixels_BCHW)

    compiled = part_compiler(ComputeOptions(torch_compile=True), symbolic=(0, 2, 3))(encode)
    for shape in ((2, 3, 8, 8), (3, 3, 8, 16)):
        pixels = torch.randn(shape, device=GPU)
        torch.testing.assert_close(compiled(pixels), encode(pixels), rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_products_of_odd_widths_are_compiled_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would measure whether to pad them, and fails where it finds a time of an earlier run."""
    monkeypatch.setattr("torch._inductor.fx_passes.pad_mm._should_pad", lambda *_: pytest.fail("measures"))
    shapes = ((24, 40), (24, 3), (40, 3))
    x, y, weight = (torch.randn(*shape, device=GPU, dtype=torch.bfloat16) for shape in shapes)
    compiled = part_compiler(ComputeOptions(torch_compile=True))(lambda x, y: torch.addmm(y, x, weight))
    torch.testing.assert_close(compiled(x, y), torch.addmm(y, x, weight))
