"""What a run takes of the GPU's memory, part by part, for the options it has or for others."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.core.errors import ConfigError
from library.data.images import drawn_source
from library.data.items import Item
from library.data.prompt import Prompt
from library.data.prompt_files import load_sample_prompts
from library.nn.swap.gradient_return import UNDER_WAY
from library.nn.transformer import Transformer
from library.nn.weights.quant import quant_layers
from library.options.request import ImageRequest
from library.options.swap import SwapOptions
from library.options.train import TrainOptions
from library.training.look.holdings import ACTIVATIONS, BlockWeights, Holdings, Parts, Sample, Upkeep
from library.training.look.meter import Speeds
from library.training.look.simulate import (
    META,
    Simulation,
    Step,
    Work,
    peak_of,
    weight_bytes,
)
from library.training.trainee.kind import Trainee

if TYPE_CHECKING:
    from library.training.context import RunContext
    from library.training.trainer import NetworkTrainer

TEXT_PASS, LATENT_PASS = "filling the text cache", "filling the latent cache"
DRAWING = "drawing sample pictures"
# What compiled blocks keep where they keep what they like, of what others keep: 1.17 and 1.18 were found, see
# docs/performance.md.
_COMPILED = 1.2
_AVERAGE = "running average (EMA)"
_TEXT_ACTIVATIONS = "activations of the text encoder"


@dataclass(frozen=True)
class Manner:
    """How a step is made: scheme of the quantised model, what blocks keep, and in every which block."""

    quant: str | None = None
    mode: str = "selective"
    every: int = 1

    @classmethod
    def of(cls, options: TrainOptions) -> Manner:
        """Return what options ask for."""
        compute = options.compute
        return cls(options.quant.transformer, compute.keeps, compute.checkpoint_every_n_blocks)


class MemoryEstimate:
    """Finds out what a run takes by going through it on the meta device. What was found out is remembered."""

    def __init__(
        self,
        trainer: NetworkTrainer,
        context: RunContext,
        *,
        tokens: int | None = None,
        kind: str = "cuda",
        speeds: Speeds | None = None,
    ) -> None:
        """`tokens`: of the longest text in training, with its source; None: as many as the text encoder
        takes. `kind`: of device.
        """
        options = trainer.options
        limit = _most_tokens(trainer, context.prepared.manifest.items)
        tread = options.tread
        routes = () if tread.steps_off(context.total_steps) else tread.routes  # the last steps take the most
        tokens = min(limit, tokens or limit)
        self._works = [Work(sizes, tokens, routes) for sizes in context.plan.heaviest_batches]
        self._most_tokens = limit
        self.trains_text = options.trainee.trains_text_encoder
        self._trainer, self._context, self._kind, self._speeds = trainer, context, kind, speeds
        self._models: dict[str | None, tuple[Simulation, Holdings]] = {}
        self._steps: dict[Manner, Step] = {}
        self._encoders: nn.Module | None = None
        self._vae: nn.Module | None = None

    @cached_property
    def work(self) -> Work:
        """The batch whose step takes the most. Captions take as much as pictures, if these are small."""
        if len(self._works) == 1:
            return self._works[0]
        manner = Manner.of(self._trainer.options)
        return max(self._works, key=lambda work: self._simulated(manner, work).peak)

    def training(self, manner: Manner, swap: SwapOptions) -> Parts:
        """Return what training takes."""
        averages, _ = self._averages(manner.quant, swap)
        return self.bytes_of_steps(manner, swap) | averages | self._encoders_in_training

    def bytes_of_steps(self, manner: Manner, swap: SwapOptions) -> Parts:
        """Return what bare steps take: the model, what is trained, and how."""
        parts = self.holdings(manner.quant).in_steps(self.step(manner), swap)
        compute = self._trainer.options.compute
        if compute.compiles and manner.mode == "none" and compute.activation_memory_budget == 1:
            parts[ACTIVATIONS] = round(parts[ACTIVATIONS] * _COMPILED)
        return parts

    def other_phases(
        self, manner: Manner, swap: SwapOptions, *, texts: bool = True, latents: bool = True
    ) -> dict[str, Parts]:
        """Return what is in memory at other times: while caches are filled, and pictures are drawn.

        texts, latents: whether there is anything to encode.
        """
        caching, phases = self._trainer.options.caching, {}
        if caching.texts and texts:
            phases[TEXT_PASS] = {
                "text encoder": self._trainer.text_encoder_bytes(self.encoders),
                "its work": self._caching_texts(caching.text_encoder_batch_size),
            }
        if caching.latents and latents:
            phases[LATENT_PASS] = {
                "autoencoder": weight_bytes(self.vae),
                "its work": self._encoding_pictures(caching.vae_batch_size),
            }
        drawing = self._drawing(manner)
        if drawing:
            staying = self.holdings(manner.quant).between_steps(swap)
            staying |= self._averages(manner.quant, swap)[0] | self._encoders_in_training
            staying.pop(_TEXT_ACTIVATIONS, None)
            if self._trainer.options.ema.ema_sample != "raw":  # the average is put in place of the weights
                staying["weights put aside"] = self.holdings(manner.quant).trained_bytes(swap)
            phases[DRAWING] = staying | {
                "autoencoder": weight_bytes(self.vae),
                "its work, or the model's": drawing,
            }
        return phases

    def in_computer(self, manner: Manner, swap: SwapOptions) -> Parts:
        """Return what training takes of the computer's memory for swapped blocks."""
        _, averages = self._averages(manner.quant, swap)
        return self.bytes_in_computer_of_steps(manner, swap) | averages

    def bytes_in_computer_of_steps(self, manner: Manner, swap: SwapOptions) -> Parts:
        """Return what bare steps take of the computer's memory for swapped blocks."""
        return self.holdings(manner.quant).in_computer(swap)

    def swapped_bytes(self, quant: str | None, swap: SwapOptions) -> int:
        """Return what is copied to the device in a pass through the model."""
        return self.holdings(quant).blocks.waiting(swap)

    def update_seconds(self, quant: str | None, swap: SwapOptions) -> float:
        """Return how long the update takes, once all gradients are there."""
        return self.holdings(quant).update_seconds(swap, self._speeds) if self._speeds else 0.0

    @cached_property
    def comes_quantised(self) -> bool:
        """Whether the file has the model quantised, and not the options."""
        return self._given_quant is None and bool(quant_layers(self.model))

    @property
    def block_count(self) -> int:
        """How many blocks the model has."""
        return len(self.simulation(self._given_quant).model.runner.blocks)

    @cached_property
    def no_swap_because(self) -> str | None:
        """Why no block can be swapped; None if blocks can be."""
        try:
            self._trainer.trainee_kind.check_swapping(self._trainer.options)
        except ConfigError as error:
            return str(error)
        return None

    @property
    def model(self) -> Transformer:
        """The model, without content."""
        return self.simulation(self._given_quant).model

    @property
    def trainee(self) -> Trainee:
        """What is trained, without content."""
        return self.simulation(self._given_quant).trainee

    def step(self, manner: Manner) -> Step:
        """Return what a step on the heaviest batch takes."""
        if manner not in self._steps:
            self._steps[manner] = self._simulated(manner, self.work)
        return self._steps[manner]

    def _simulated(self, manner: Manner, work: Work) -> Step:
        simulation = self.simulation(manner.quant)
        between = self._trainer.options.compute.keeps_between(manner.mode)
        simulation.model.runner.keep(manner.mode, every=manner.every, between=between)
        return simulation.step(work, speeds=self._speeds)

    def holdings(self, quant: str | None) -> Holdings:
        """Return what is kept, with the model in a precision."""
        return self._model_in(quant)[1]

    def simulation(self, quant: str | None) -> Simulation:
        """Return the model in a precision, with the network on it."""
        return self._model_in(quant)[0]

    def _model_in(self, quant: str | None) -> tuple[Simulation, Holdings]:
        """Return the model in a precision, with the network on it and its text encoder; and what is kept."""
        if quant not in self._models:
            options = self._trainer.options
            trainer = self._trainer.with_options(
                replace(options, quant=replace(options.quant, **quant_flags(quant)))
            )
            with _unsaid():
                model = trainer.load_transformer(META, self._context.dtype)
                blocks = BlockWeights.of(model.runner.blocks)
                trainee = trainer.trainee_kind.make(
                    options, model, lambda: self.encoders, seed=self._context.seed, started=False
                )
            simulation = Simulation(trainer, model, trainee, kind=self._kind)
            holdings = Holdings(
                *(model, trainee, blocks, self._upkeep),
                in_backward=options.trainee.fused,
                several=options.training.gradient_accumulation_steps > 1,
                under_way=1 if self._kind == "cpu" else UNDER_WAY,
            )
            self._models[quant] = simulation, holdings
        return self._models[quant]

    @property
    def encoders(self) -> nn.Module:
        """The text encoder, without content."""
        if self._encoders is None:
            with _unsaid():
                self._encoders = self._trainer.load_text_encoders(META, self._context.dtype)
        return self._encoders

    @property
    def vae(self) -> nn.Module:
        """The autoencoder, without content."""
        if self._vae is None:
            self._vae = self._trainer.load_vae(META, self._context.dtype)
        return self._vae

    @property
    def _given_quant(self) -> str | None:
        return self._trainer.options.quant.transformer

    @cached_property
    def _encoders_in_training(self) -> Parts:
        """What encoders take while training, as far as they are not cached."""
        caching, parts = self._trainer.options.caching, Parts()
        if self.trains_text:
            parts[_TEXT_ACTIVATIONS] = self._kept_of_texts()
        if not caching.texts:
            parts["text encoder"] = self._trainer.text_encoder_bytes(self.encoders)
        if not caching.latents:
            parts["autoencoder"] = weight_bytes(self.vae)
        return parts

    def _upkeep(self, dtype: torch.dtype) -> Upkeep:
        """Return what a trained weight of this dtype takes. Raises ConfigError: nothing can step it."""
        context, trainer = self._context, self._trainer
        trainer.trainee_kind.check_optimizer(trainer.options, context.device)

        def make(sample: Sample) -> torch.optim.Optimizer:
            return trainer.trainee_kind.optimizer(sample, trainer.options, seed=context.seed)

        with _unsaid(logging.WARNING):  # the run will say it
            return Upkeep.of(make, dtype, context.device)

    def _averages(self, quant: str | None, swap: SwapOptions) -> tuple[Parts, Parts]:
        """Return what averages take of the device, and of the computer's memory for swapped blocks."""
        if not self._trainer.options.ema.ema:
            return {}, {}
        here, there = ({_AVERAGE: 4 * n} if n else {} for n in self.holdings(quant).numbers(swap))
        return here, there

    def _kept_of_texts(self) -> int:
        return self._encoding_texts(len(self.work.sizes), trained=True)[1]

    def _caching_texts(self, count: int) -> int:
        """What a batch takes: looking at the sources, then the texts with what was seen of the sources."""
        texts = self._encoding_texts(count, trained=False)[0]
        items = self._context.prepared.manifest.items
        sources = [item.geometry.bucket for item in items if item.source is not None]
        if not sources:
            return texts
        largest, encoders = max(sources, key=prod), self.encoders
        looking, seen = peak_of(
            lambda: self._trainer.see_blank(encoders, largest, count), encoders, looks_at_values=False
        )
        return max(looking, seen + texts)

    def _encoding_texts(self, count: int, *, trained: bool) -> tuple[int, int]:
        checkpointed = self._trainer.options.compute.gradient_checkpointing and trained
        self.encoders.gradient_checkpointing = checkpointed

        def encode() -> object:
            with torch.set_grad_enabled(trained):
                return self._trainer.encode_blank(self.encoders, self.work.tokens, count)

        trained_ones = (self.trainee,) if trained else ()  # on the encoder from when it is asked for
        return peak_of(encode, self.encoders, *trained_ones)

    def _encoding_pictures(self, count: int) -> int:
        width, height = max(
            (item.geometry.bucket for item in self._context.prepared.manifest.items), key=prod
        )
        pixels_BCHW = torch.zeros(count, 3, height, width, device=META)
        return peak_of(lambda: self._trainer.encode_images(self.vae, pixels_BCHW), self.vae)[0]

    def _drawing(self, manner: Manner) -> int:
        """What the largest sample picture takes beside weights; 0 if none are drawn."""
        sampling, family = self._trainer.options.sampling, self._trainer.family
        if sampling.prompts is None:
            return 0
        requests = load_sample_prompts(sampling.prompts, ImageRequest(seed=0))
        width, height = max(((r.width, r.height) for r in requests), key=lambda size: size[0] * size[1])
        grid = (height // family.latent_stride, width // family.latent_stride)
        latents_BCHW = torch.zeros(1, family.latent_channels, *grid, device=META)
        decoding = peak_of(lambda: self._trainer.decode_latents(self.vae, latents_BCHW), self.vae)[0]
        both = Work(((width, height),) * 2 * sampling.sample_batch_size, self._most_tokens)  # and unguided
        return max(decoding, self.simulation(manner.quant).forward(both))


def _most_tokens(trainer: NetworkTrainer, items: Sequence[Item]) -> int:
    """Return how many tokens the text encoder takes at most: of a text, and of a source as large as any."""
    edits = {item.geometry.bucket: item for item in items if item.source is not None}
    sources = [drawn_source(item, None, flip=False) for item in edits.values()]
    return max(trainer.count_tokens(Prompt("", source))[1] for source in (None, *sources))


@contextmanager
def _unsaid(level: int = logging.INFO) -> Iterator[None]:
    """Keep from the log what is said, up to a level, of what is only looked at."""
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def quant_flags(scheme: str | None) -> dict[str, object]:
    """Return the options of `QuantOptions` that mean a scheme, whatever was said before."""
    return {"base_quant": scheme, "fp8_base": False, "fp8_base_unet": False, "fp8_scaled": False}


def free_memory() -> int:
    """Return how many bytes of the computer's memory can be had now."""
    import psutil  # comes with accelerate

    return psutil.virtual_memory().available


def shown(size: float) -> str:
    """Return an amount of memory as people read it."""
    return f"{size / 2**30:.2f} GiB" if abs(size) >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def summed(parts: Parts) -> str:
    """Return how much parts are together, and each of them."""
    named = ", ".join(f"{name} {shown(size)}" for name, size in parts.items())
    return f"{shown(sum(parts.values()))} ({named})"
