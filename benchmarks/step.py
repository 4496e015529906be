"""One training step of a LoRA: ours, diffusers + peft, the reference tool's arithmetic; on the same weights.

    python benchmarks/step.py                          # bf16, batch 1, one CPU thread
    python benchmarks/step.py --dtype fp32 --batch 4
    python benchmarks/step.py --device cuda --size full

All train LoRA of rank 16 on attention and feed-forward of the same random Lumina Image 2.0 transformer
with AdamW and clipping by norm. Needs `diffusers` and `peft` (requirements-dev.txt). "reference" is
benchmarks/reference_model.py: what sd-scripts computes, in plain torch, and not that tool itself.

Time: steps of ours, theirs and ours again (the control, which shows the noise) take turns in one process;
medians. With one CPU thread it is the process's CPU time, which other work on the machine disturbs least;
with several threads it is wall time; on CUDA it is device time. The first step of each is not counted.
Matmul share: the products that the step cannot do without (no weight gradients of frozen weights, attention
backward = 2 x forward, real caption tokens only) over the time that a 1536^3 product, measured between the
steps in the fastest dtype that this processor has for it, says they should take.
Memory: each implementation alone in a process; the peak during two steps, above what was there before them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.reference_model import ReferenceModel  # noqa: E402
from benchmarks.report import Result, add_arguments, matmul_gflops, show, summarise, write  # noqa: E402
from library.core.device import keep_freed_memory  # noqa: E402
from library.models.lumina2_format import NextDiTParams, diffusers_names, parameter_shapes  # noqa: E402
from library.models.nextdit import NextDiT  # noqa: E402
from library.nn.products import product_dtype  # noqa: E402
from networks.lora import LoRANetwork, LoRASize, linear_layers  # noqa: E402

RANK = 16
MATMUL = 1536


@dataclass(frozen=True)
class Size:
    """A model and a latent size; captions have 60 tokens, later ones of a batch a little fewer."""

    params: NextDiTParams
    latent: int
    caption: int = 60


def _params(
    dim: int, heads: int, kv_heads: int, layers: int, refiners: int, axes: tuple[int, int, int]
) -> NextDiTParams:
    return NextDiTParams(
        dim=dim, n_layers=layers, n_noise_refiners=refiners, n_context_refiners=refiners, n_heads=heads,
        n_kv_heads=kv_heads, head_dim=dim // heads, ffn_dim=4 * dim, cap_feat_dim=dim,
        time_dim=min(dim, 1024),
        axes_dims=axes, qk_norm_eps=1e-5,
    )  # fmt: skip


SIZES = {
    "nano": Size(_params(192, 4, 2, 4, 1, (16, 16, 16)), latent=32),
    "mid": Size(_params(768, 12, 4, 8, 2, (24, 20, 20)), latent=64),
    "full": Size(_params(2304, 24, 8, 26, 2, (32, 32, 32)), latent=128),
}


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    size: str
    dtype: torch.dtype
    batch: int
    device: torch.device
    checkpointing: bool

    def __str__(self) -> str:
        more = ", checkpointing" if self.checkpointing else ""
        return f"{self.size}, {self.dtype}, batch {self.batch}, {self.device.type}{more}"

    @property
    def params(self) -> NextDiTParams:
        """Of the model."""
        return SIZES[self.size].params


@dataclass(frozen=True)
class Work:
    """One batch."""

    latents_BCHW: Tensor
    target_BCHW: Tensor
    t_B: Tensor
    captions: list[Tensor]


def make_work(settings: Settings) -> Work:
    """Draw a batch; captions of a batch differ in length."""
    size, draw = SIZES[settings.size], torch.Generator().manual_seed(1)
    shape = (settings.batch, settings.params.in_channels, size.latent, size.latent)
    latents, target = (torch.randn(shape, generator=draw).to(settings.device) for _ in range(2))
    lengths = [size.caption - 7 * (index % 3) for index in range(settings.batch)]
    captions = [torch.randn(n, settings.params.cap_feat_dim, generator=draw) for n in lengths]
    captions = [caption.to(settings.device, settings.dtype) for caption in captions]
    return Work(latents, target, torch.linspace(0.2, 0.8, settings.batch).to(settings.device), captions)


def make_weights(params: NextDiTParams) -> dict[str, Tensor]:
    """Draw weights of sane size, by original name; nothing is zero."""
    draw, weights = torch.Generator().manual_seed(0), {}
    for name, shape in parameter_shapes(params):
        noise = torch.randn(shape, generator=draw)
        weights[name] = noise / shape[1] ** 0.5 if len(shape) == 2 else 1 + 0.1 * noise
    return weights


class Contestant(Protocol):
    """An implementation with its trainable weights."""

    trained: list[torch.nn.Parameter]

    def loss(self, work: Work) -> Tensor:
        """Forward."""


class Ours:
    """This project."""

    def __init__(self, settings: Settings) -> None:
        keep_freed_memory()  # as `load_nextdit` does
        with torch.device("meta"):
            model = NextDiT(settings.params)
        weights = make_weights(settings.params)
        for name in list(weights):
            dtype = torch.float32 if name.startswith("t_embedder.") else settings.dtype
            weights[name] = weights[name].to(settings.device, dtype)
        model.load_state_dict(weights, assign=True)
        self.model = model.requires_grad_(False)
        self.model.runner.keep("full" if settings.checkpointing else "none")
        targets = (path for path in linear_layers(model) if ".attention." in path or ".feed_forward." in path)
        self.network = LoRANetwork(model, {path: LoRASize(RANK, RANK) for path in targets})
        self.network.apply_to(model)
        self.trained = list(self.network.parameters())
        _disturb(self.trained)

    def loss(self, work: Work) -> Tensor:
        """Forward."""
        out = torch.stack(self.model(work.latents_BCHW.unbind(), work.t_B, work.captions))
        return (out.float() - work.target_BCHW).square().mean()


class Rival:
    """diffusers + peft, as diffusers' own LoRA scripts use them: fp32 adapters under autocast."""

    def __init__(self, settings: Settings) -> None:
        from diffusers import Lumina2Transformer2DModel
        from peft import LoraConfig

        p = settings.params
        self.dtype, self.device = settings.dtype, settings.device
        with torch.device(settings.device):
            model = Lumina2Transformer2DModel(
                sample_size=128, patch_size=p.patch_size, in_channels=p.in_channels, hidden_size=p.dim,
                num_layers=p.n_layers, num_refiner_layers=p.n_noise_refiners, num_attention_heads=p.n_heads,
                num_kv_heads=p.n_kv_heads, axes_dim_rope=p.axes_dims, cap_feat_dim=p.cap_feat_dim,
            )  # fmt: skip
        model.load_state_dict(_for_diffusers(make_weights(p), p))
        self.model = model.to(settings.dtype).requires_grad_(False)
        if settings.checkpointing:
            model.enable_gradient_checkpointing()
        targets = r".*\.(attn\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.linear_[123])"
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in self.trained:
            weight.data = weight.data.float()
        _disturb(self.trained)

    def loss(self, work: Work) -> Tensor:
        """Forward; captions are padded and masked, as this implementation needs them."""
        captions = torch.nn.utils.rnn.pad_sequence(work.captions, batch_first=True)
        lengths = torch.tensor([len(caption) for caption in work.captions], device=self.device)
        mask = torch.arange(captions.shape[1], device=self.device) < lengths[:, None]
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=half):
            out = self.model(work.latents_BCHW.to(self.dtype), work.t_B, captions, mask, return_dict=False)[0]
        return (out.float() - work.target_BCHW).square().mean()


class Reference:
    """The reference tool's arithmetic; its captions are padded to 256 tokens."""

    def __init__(self, settings: Settings) -> None:
        self.dtype, self.device = settings.dtype, settings.device
        model = ReferenceModel(settings.params, make_weights(settings.params))
        self.model = model.to(settings.device, settings.dtype).requires_grad_(False)
        self.model.checkpointing = settings.checkpointing
        self.trained = [weight.requires_grad_() for weight in self.model.add_loras(RANK)]
        _disturb(self.trained)

    def loss(self, work: Work) -> Tensor:
        """Forward."""
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=half):
            out = self.model(work.latents_BCHW.to(self.dtype), work.t_B, work.captions)
        return (out.float() - work.target_BCHW).square().mean()


CONTESTANTS: dict[str, Callable[[Settings], Contestant]] = {
    "ours": Ours,
    "diffusers": Rival,
    "reference": Reference,
}


def _disturb(trained: list[torch.nn.Parameter]) -> None:
    """Move LoRA away from its start, where half of it is zero."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in trained:
            weight.add_(0.01 * torch.randn(weight.shape, generator=draw).to(weight.device))


def _for_diffusers(weights: dict[str, Tensor], params: NextDiTParams) -> dict[str, Tensor]:
    rows = [heads * params.head_dim for heads in (params.n_heads, params.n_kv_heads, params.n_kv_heads)]
    renamed = {}
    for name, weight in weights.items():
        names = diffusers_names(name)
        renamed |= zip(names, weight.split(rows) if len(names) == 3 else (weight,), strict=True)
    return renamed


def make_step(contestant: Contestant, work: Work) -> Callable[[], None]:
    """Return one optimizer step as a function."""
    optimizer = torch.optim.AdamW(contestant.trained, lr=1e-4)

    def step() -> None:
        contestant.loss(work).backward()
        torch.nn.utils.clip_grad_norm_(contestant.trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def useful_flops(settings: Settings) -> float:
    """Floating-point operations of the products that a step needs, see the module's docstring."""
    p, size = settings.params, SIZES[settings.size]
    matrices = p.dim * (p.qkv_dim + p.n_heads * p.head_dim + 3 * p.ffn_dim)
    image = (size.latent // p.patch_size) ** 2
    total = 0.0
    for index in range(settings.batch):
        text = size.caption - 7 * (index % 3)
        for blocks, tokens in (
            (p.n_layers, text + image),
            (p.n_noise_refiners, image),
            (p.n_context_refiners, text),
        ):
            linear = 2 * 2 * tokens * matrices  # forward, and backward to the input
            attention = 3 * 4 * tokens**2 * p.n_heads * p.head_dim  # forward, and twice that backward
            total += blocks * (linear + attention)
            if settings.checkpointing:
                total += blocks * (linear / 2 + attention / 3)
    return total


class Clock:
    """Seconds that a function takes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind = "device" if device.type == "cuda" else "CPU" if torch.get_num_threads() == 1 else "wall"

    def __call__(self, function: Callable[[], object]) -> float:
        if self.kind == "device":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000
        read = time.process_time if self.kind == "CPU" else time.perf_counter
        begin = read()
        function()
        return read() - begin


def measure_time(settings: Settings, reps: int) -> list[Result]:
    """Print medians of interleaved steps; return them against each rival."""
    work, clock = make_work(settings), Clock(settings.device)
    turns = {name: make_step(make(settings), work) for name, make in CONTESTANTS.items()}
    turns["control"] = turns["ours"]
    times: dict[str, list[float]] = {name: [] for name in turns}
    rates: list[float] = []
    square = torch.randn(MATMUL, MATMUL, device=settings.device, dtype=settings.dtype)
    square = square.to(product_dtype(square))
    for rep in range(reps + 1):
        for name, step in turns.items():
            matmul = clock(lambda: square @ square)
            seconds = clock(step)
            if rep:
                rates.append(2 * MATMUL**3 / matmul)
                times[name].append(seconds)
    rate = statistics.median(rates)
    tokens = sum((SIZES[settings.size].latent // 2) ** 2 + len(caption) for caption in work.captions)
    print(f"matmul rate {rate / 1e9:.0f} GFLOP/s in {square.dtype}; {clock.kind} time, {reps} rounds")
    print("| implementation | ms/step | tokens/s | share of matmul rate |\n|---|---|---|---|")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        share = useful_flops(settings) / rate / middle
        print(f"| {name} | {middle * 1e3:.0f} | {tokens / middle:.0f} | {share:.3f} |")
    results = []
    for rival in ("diffusers", "reference"):
        title = f"Step against {rival}: {settings}"
        results.append(summarise(title, times, rival, rate / 1e9, f"{clock.kind} seconds"))
        show(results[-1], "step")
    return results


def peak_above_weights(settings: Settings, name: str) -> dict[str, float]:
    """Return MB before the first step and the peak during two steps; meant for a process of its own."""
    step = make_step(CONTESTANTS[name](settings), make_work(settings))
    if settings.device.type == "cuda":
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what building the model left behind would be used by the step, uncounted
        Path("/proc/self/clear_refs").write_text("5")  # lowers the recorded peak to the present size
        base = _status_bytes("VmRSS")
    step()
    step()
    peak = torch.cuda.max_memory_allocated() if settings.device.type == "cuda" else _status_bytes("VmHWM")
    return {"base": base / 2**20, "peak": peak / 2**20}


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure_memory(arguments: list[str]) -> dict[str, float]:
    """Return MB of each implementation, measured in a child process (Linux only on the CPU)."""
    peaks = {}
    for name in CONTESTANTS:
        command = [sys.executable, __file__, *arguments, "--memory_of", name]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(result.stdout.splitlines()[-1])
        peaks[name] = found["peak"] - found["base"]
    return peaks


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", choices=tuple(SIZES), default="mid")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in both")
    parser.add_argument("--only", choices=("time", "memory"), help="measure just this")
    parser.add_argument("--memory_of", choices=tuple(CONTESTANTS), help=argparse.SUPPRESS)
    add_arguments(parser, rounds=6)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Measure and print."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    settings = Settings(args.size, dtype, args.batch, torch.device(args.device), args.checkpointing)
    if args.memory_of:
        print(json.dumps(peak_above_weights(settings, args.memory_of)))
        return
    print(f"size {args.size}, {args.dtype}, batch {args.batch}, {args.device}, {args.threads} thread(s)")
    results = [] if args.only == "memory" else measure_time(settings, args.rounds)
    if args.only != "time":
        peaks = measure_memory(arguments)
        title = f"Peak memory of a step above what was there before: {settings}"
        figures = {name: [peak] for name, peak in peaks.items()}
        results.append(summarise(title, figures, "diffusers", matmul_gflops(), "MB"))
        show(results[-1], "step")
    write(results, args.json)


if __name__ == "__main__":
    main(sys.argv[1:])
