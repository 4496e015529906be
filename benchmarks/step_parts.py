"""What the benchmarks of a training step share: what is measured, who takes part, and by which clock."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from benchmarks.report import device_to_measure, missing_packages
from library.nn.swap.block_swap import chosen_blocks, device_of_weights, make_ring
from library.nn.transformer import Transformer
from library.nn.weights.eight_bit import check_device
from library.nn.weights.quant import multiply_in_8_bits, quant_layers, use_quant_layers
from library.options.compute import ComputeOptions
from library.options.quant import QuantOptions
from library.options.swap import SwapOptions

RANK = 16
WHOLE, NO_SWAP = QuantOptions(), SwapOptions()
Model = TypeVar("Model", bound=Transformer)


class Contestant(Protocol):
    """An implementation with its trainable weights. `packages`: what it needs beside this project's own."""

    packages: ClassVar[tuple[str, ...]]
    trained: list[torch.nn.Parameter]

    def loss(self, work: Any) -> Tensor:
        """Forward, for a batch of the family's own kind."""


class Size(Protocol):
    """A model of a family, and what it is given."""

    @property
    def params(self) -> Any:
        """The sizes of the network."""


@dataclass(frozen=True)
class Family:
    """The models of one family. Contestants make an implementation; the first is ours, the others rivals.

    work: draws a batch. useful_flops: operations of the products that a step cannot do without. tokens: how
    many a batch has.
    """

    name: str
    sizes: Mapping[str, Size]
    contestants: Mapping[str, type[Contestant]]
    work: Callable[[Settings], Any]
    useful_flops: Callable[[Settings], float]
    tokens: Callable[[Settings], int]


@dataclass(frozen=True)
class Settings:
    """What is measured. `quant` and `swap` are about ours alone."""

    family: Family
    size: str
    dtype: torch.dtype
    batch: int
    device: torch.device
    checkpointing: bool
    quant: QuantOptions = WHOLE
    swap: SwapOptions = NO_SWAP

    def __str__(self) -> str:
        more = ", checkpointing" if self.checkpointing else ""
        name = "" if self.family.name == "lumina" else f"{self.family.name} "
        return f"{name}{self.size}, {self.dtype}, batch {self.batch}, {self.device.type}{more}"

    @property
    def params(self) -> Any:
        """Of the model."""
        return self.family.sizes[self.size].params


def add_model_arguments(
    parser: argparse.ArgumentParser, families: Iterable[str], family: str = "lumina"
) -> None:
    """Add the flags that `settings_of` reads. family: the one that is measured without a flag."""
    parser.add_argument("--family", choices=tuple(families), default=family)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", choices=("nano", "mid", "full"), default="mid")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_to_measure, default=device)


def settings_of(given: argparse.Namespace, family: Family, *, checkpointing: bool = False) -> Settings:
    """Return what a command line asks for."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[given.dtype]
    return Settings(family, given.size, dtype, given.batch, given.device, checkpointing)


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


def taking_part(family: Family) -> dict[str, type[Contestant]]:
    """Return the contestants of a family whose packages are installed; tell of each other in a sentence."""
    found = {}
    for name, contestant in family.contestants.items():
        missing = missing_packages(*contestant.packages)
        if missing:
            print(f"{name} does not take part: {missing} not installed.", file=sys.stderr)
        else:
            found[name] = contestant
    return found


def draw_weights(
    shapes: Iterable[tuple[str, tuple[int, ...]]], device: torch.device, *, norm: Callable[[str], bool]
) -> Iterator[tuple[str, Tensor]]:
    """Yield weights of sane size by name, none of them zero, drawn on the device.

    They are fp32 numbers that bf16 holds, as released models are. `norm`: whether one is around 1.
    """
    draw = torch.Generator(device).manual_seed(0)
    for name, shape in shapes:
        noise = torch.randn(shape, generator=draw, device=device)
        weight = noise / shape[1] ** 0.5 if len(shape) == 2 else 0.1 * noise + norm(name)
        yield name, weight.bfloat16().float()


def fill(
    model: Model,
    weights: Iterable[tuple[str, Tensor]],
    settings: Settings,
    *,
    quantisable: Sequence[str],
    in_fp32: str,
) -> Model:
    """Give a model on the meta device weights, in the way that `load_transformer` does from a file."""
    scheme = settings.quant.transformer
    if scheme is not None:
        use_quant_layers(model, quantisable, scheme)
    if settings.quant.quant_matmul:
        check_device(scheme, settings.device)
    swapped = chosen_blocks(model.runner.blocks, settings.swap)
    place, quantised, whole = device_of_weights(model, swapped, settings.device), quant_layers(model), {}
    for name, weight in weights:
        weight = weight.to(torch.float32 if name.startswith(in_fp32) else settings.dtype)
        if name in quantised:
            quantised[name].quantise(weight, place(name))
        else:
            whole[name] = weight.to(place(name))
    loaded = model.load_state_dict(whole, strict=False, assign=True)
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    assert not any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers()))
    if settings.quant.quant_matmul:
        multiply_in_8_bits(model)
    if swapped:
        model.requires_grad_(False)  # weights that are trained later are swapped in another way
        model.runner.ring = make_ring(swapped, settings.device, settings.swap)
    model.runner.keep(ComputeOptions(gradient_checkpointing=settings.checkpointing).keeps)
    return model


def make_step(contestant: Contestant, work: object, lr: float = 1e-4) -> Callable[[], None]:
    """Return one optimizer step as a function."""
    optimizer = torch.optim.AdamW(contestant.trained, lr=lr)

    def step() -> None:
        contestant.loss(work).backward()
        torch.nn.utils.clip_grad_norm_(contestant.trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def disturb(trained: list[torch.nn.Parameter]) -> None:
    """Move LoRA away from its start, where half of it is zero."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in trained:
            weight.add_(0.01 * torch.randn(weight.shape, generator=draw).to(weight.device))
