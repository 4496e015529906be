"""What a run takes of the GPU's memory, part by part, for the options it has or for others."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.data.images import drawn_source
from library.data.items import Item
from library.data.prompt import Prompt
from library.data.prompt_files import load_sample_prompts
from library.nn.block_swap import chosen_blocks, spared_bytes
from library.nn.transformer import Transformer
from library.options.optimizer import OptimizerOptions
from library.options.request import ImageRequest
from library.options.swap import SwapOptions
from library.options.train import TrainOptions
from library.training.look.meter import Speeds
from library.training.look.simulate import META, Simulation, Step, Work, peak_of, weight_bytes
from library.training.optim.optimizer import create_optimizer, export_state
from networks.lora import LoRANetwork
from networks.module import install_new_network

if TYPE_CHECKING:
    from library.training.context import RunContext
    from library.training.trainer import NetworkTrainer

_SAMPLE = 256  # rows and columns of the matrix that tells an optimizer's memory; constants hardly count

Parts = dict[str, int]  # bytes of what is in memory at the same time


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
        """`tokens`: of the longest caption and its source; None: as many as the text encoder takes. `kind`:
        of device.
        """
        options = trainer.options
        limit = _most_tokens(trainer, context.prepared.manifest.items)
        tread = options.tread
        routes = () if tread.steps_off(context.total_steps) else tread.routes  # the last steps take the most
        self.work = Work(context.plan.largest_batch, min(limit, tokens or limit), routes)
        self.trains_text = options.network.trains_text_encoder
        self._trainer, self._context, self._kind, self._speeds = trainer, context, kind, speeds
        self._simulations: dict[str | None, Simulation] = {}
        self._steps: dict[Manner, Step] = {}
        self._encoders: nn.Module | None = None
        self._vae: nn.Module | None = None

    def training(self, manner: Manner, swap: SwapOptions) -> Parts:
        """Return what training takes."""
        options, network = self._trainer.options, self.network
        gradients = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
        per_number = optimizer_bytes(options.optimizer, self._context.device)
        count = network.parameter_count()
        parts = {
            "transformer": self.weights(manner.quant, swap),
            "network, gradients, optimizer": round(weight_bytes(network) + gradients + count * per_number),
            "activations of the largest batch": self.step(manner).peak - gradients,
        }
        if options.ema.ema:
            parts["running average (EMA)"] = 4 * count
        if self.trains_text:
            parts["activations of the text encoder"] = self._kept_of_texts()
        if not options.caching.texts:
            parts["text encoder"] = self._trainer.text_encoder_bytes(self.encoders)
        if not options.caching.latents:
            parts["autoencoder"] = weight_bytes(self.vae)
        return parts

    def other_phases(
        self, manner: Manner, swap: SwapOptions, *, texts: bool = True, latents: bool = True
    ) -> dict[str, Parts]:
        """Return what is in memory at other times: while caches are filled, and pictures are drawn.

        texts, latents: whether there is anything to encode.
        """
        caching, phases = self._trainer.options.caching, {}
        if caching.texts and texts:
            phases["filling the text cache"] = {
                "text encoder": self._trainer.text_encoder_bytes(self.encoders),
                "its work": self._caching_texts(caching.text_encoder_batch_size),
            }
        if caching.latents and latents:
            phases["filling the latent cache"] = {
                "autoencoder": weight_bytes(self.vae),
                "its work": self._encoding_pictures(caching.vae_batch_size),
            }
        drawing = self._drawing(manner)
        if drawing:
            training = self.training(manner, swap)
            staying = {name: size for name, size in training.items() if "activations" not in name}
            phases["drawing sample pictures"] = staying | {
                "autoencoder": weight_bytes(self.vae),
                "its work, or the model's": drawing,
            }
        return phases

    def weights(self, quant: str | None, swap: SwapOptions) -> int:
        """Return what the model's weights take of the device."""
        model = self.simulation(quant).model
        swapped = chosen_blocks(model.runner.blocks, swap)
        return weight_bytes(model) - spared_bytes(swapped, swap.block_swap_ring_size)

    def swapped_bytes(self, quant: str | None, swap: SwapOptions) -> int:
        """Return what is copied to the device in a pass through the model."""
        blocks = chosen_blocks(self.simulation(quant).model.runner.blocks, swap)
        return spared_bytes(blocks, 0)

    @property
    def blocks(self) -> int:
        """How many blocks the model has."""
        return len(self.simulation(self._given_quant).model.runner.blocks)

    @property
    def model(self) -> Transformer:
        """The model, without content."""
        return self.simulation(self._given_quant).model

    @property
    def network(self) -> LoRANetwork:
        """What is trained, without content."""
        return self.simulation(self._given_quant).network

    def step(self, manner: Manner) -> Step:
        """Return what a step on the largest batch takes."""
        if manner not in self._steps:
            simulation = self.simulation(manner.quant)
            options = self._trainer.options
            between = options.compute.keeps_between(manner.mode)
            simulation.model.runner.keep(manner.mode, every=manner.every, between=between)
            several = options.training.gradient_accumulation_steps > 1
            self._steps[manner] = simulation.step(self.work, gradients_there=several, speeds=self._speeds)
        return self._steps[manner]

    def simulation(self, quant: str | None) -> Simulation:
        """Return the model in a precision, with the network on it."""
        if quant not in self._simulations:
            options = self._trainer.options
            trainer = self._trainer.with_options(
                replace(options, quant=replace(options.quant, **quant_flags(quant)))
            )
            with _unsaid():
                model = trainer.load_transformer(META, self._context.dtype)
                network = install_new_network(
                    options.network,
                    model,
                    lambda: self.encoders,
                    seed=self._context.seed,
                    learning_rate=options.optimizer.learning_rate,
                )
            network.train()
            if options.training.full_bf16:
                network.to(torch.bfloat16)
            self._simulations[quant] = Simulation(trainer, model, network, kind=self._kind)
        return self._simulations[quant]

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

    def _kept_of_texts(self) -> int:
        self.simulation(self._given_quant)  # puts the network on the text encoder
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

        networks = (self.network,) if trained else ()
        return peak_of(encode, self.encoders, *networks)

    def _encoding_pictures(self, count: int) -> int:
        width, height = max(self.work.sizes, key=lambda size: size[0] * size[1])
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
        both = Work(((width, height),) * 2 * sampling.sample_batch_size, self.work.tokens)  # and unguided
        return max(decoding, self.simulation(manner.quant).forward(both))


def _most_tokens(trainer: NetworkTrainer, items: Sequence[Item]) -> int:
    """Return how many tokens the text encoder takes at most: of a text, and of a source as large as any."""
    edits = {item.geometry.bucket: item for item in items if item.source is not None}
    sources = [drawn_source(item, None, flip=False) for item in edits.values()]
    return max(trainer.count_tokens(Prompt("", source))[1] for source in (None, *sources))


def optimizer_bytes(options: OptimizerOptions, device: torch.device) -> float:
    """Return how many bytes the optimizer keeps for each trained number, by letting it make one step."""
    weight = nn.Parameter(torch.zeros(_SAMPLE, _SAMPLE, device=device))
    optimizer = create_optimizer([{"params": [weight], "lr": 1e-4, "name": "sample"}], options)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    tensors, _ = export_state(optimizer)
    return sum(t.numel() * t.element_size() for t in tensors.values()) / weight.numel()


@contextmanager
def _unsaid() -> Iterator[None]:
    """Keep from the log what is said of models that are only looked at."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def quant_flags(scheme: str | None) -> dict[str, object]:
    """Return the options of `QuantOptions` that mean a scheme, whatever was said before."""
    return {"base_quant": scheme, "fp8_base": False, "fp8_base_unet": False, "fp8_scaled": False}


def shown(size: float) -> str:
    """Return an amount of memory as people read it."""
    return f"{size / 2**30:.2f} GiB" if abs(size) >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
