"""What the model is fed: latents and conditions, from caches or from encoders that stay loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.core.dist import Processes
from library.data.batch import Batch, Condition
from library.data.cached import CachePlace, LatentCache, TextCache
from library.data.images import load_source
from library.data.items import Item, Manifest
from library.data.prompt import Prompt, SourcePicture
from library.data.tensors import pixels_to_tensor
from library.nn.running.compiling import check_inductor, part_compiler
from library.options.compute import ComputeOptions
from library.options.train import TrainOptions
from library.training.caching import EncodePictures, PassRun, cache_latents, cache_texts
from library.training.cut_texts import CutTexts
from library.training.family import CacheIdentities
from library.training.lending import Lending

if TYPE_CHECKING:
    from library.training.trainer import NetworkTrainer


class Inputs:
    """The encoders of a run and what they made.

    With caches the encoders are loaded only for what is missing, and are gone before the transformer comes;
    without them they stay for the whole run.
    """

    def __init__(
        self,
        trainer: NetworkTrainer,
        identities: CacheIdentities,
        processes: Processes,
        dtype: torch.dtype,
    ) -> None:
        options, device = trainer.options, processes.device
        self._trainer = trainer
        self._options = options
        self._processes = processes
        self.vae = Lending(lambda: trainer.load_vae(device, dtype), device)
        self.encoders = Lending(lambda: trainer.load_text_encoders(device, dtype), device)
        self.latent_cache = _latent_cache(options, identities)
        self.text_cache = _text_cache(trainer, identities)
        self._cut_texts = CutTexts(trainer)
        self._prompts: dict[Prompt, Condition] = {}
        self._edited: dict[SourcePicture, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where latents and conditions go."""
        return self._processes.device

    def fill_caches(self, manifest: Manifest) -> None:
        """Encode what the caches lack, text first, and let the encoders go.

        Raises ConfigError, or MissingPackageError, if the autoencoder cannot be compiled as it should be.
        """
        if self.latent_cache is not None and self._options.caching.vae_torch_compile:
            check_inductor("--vae_torch_compile", self.device)
        items = [manifest.items[i] for i in (*manifest.train, *manifest.validation)]
        if self.text_cache is not None:
            self._fill_texts(self.text_cache, items)
        if self.latent_cache is not None:
            self._fill_latents(self.latent_cache, items)

    def latents(self, batch: Batch) -> Sequence[Tensor]:
        """Return a batch's scaled latents, (C, h, w) a picture, on this process's device."""
        if batch.latents is not None:
            return [latent.to(self._processes.device, non_blocking=True) for latent in batch.latents]
        assert batch.pixels is not None
        return self._encode_pictures(batch.pixels)

    def conditions(self, batch: Batch) -> list[Condition]:
        """Return a batch's conditions on this process's device, with the latents of what is edited."""
        conditions, sources = self._text_conditions(batch), self._source_latents(batch)
        return [
            condition if source_Chw is None else replace(condition, source_Chw=source_Chw)
            for condition, source_Chw in zip(conditions, sources, strict=True)
        ]

    def prompts(self, prompts: Sequence[Prompt]) -> list[Condition]:
        """Return the conditions of prompts for previews, each encoded once in the run.

        Where the text encoder is trained, they are encoded every time.
        Each goes through the encoder alone, as in the inference script, so that the pictures are the same,
        unless the family wants more at once.
        The autoencoder stays loaded, if there was a source to encode, until `release_vae`.
        """
        if self._options.trainee.trains_text_encoder:
            self._prompts.clear()
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompts]
        self._cut_texts.tell_first(new)
        at_once = self._trainer.texts_at_once(1)
        for start in range(0, len(new), at_once):
            some = new[start : start + at_once]
            self._prompts |= zip(some, self._encode(some), strict=True)
        if new and self.text_cache is not None:
            self.encoders.release()
        return [self._on_device(self._with_source(prompt)) for prompt in prompts]

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Return pixels in [-1, 1]; the autoencoder stays loaded until `release_vae`."""
        return self._trainer.decode_latents(self.vae.get(), latents_BCHW)

    def release_vae(self) -> None:
        """Let the autoencoder go after previews, unless training itself encodes with it."""
        if self.latent_cache is not None:
            self.vae.release()

    def _text_conditions(self, batch: Batch) -> list[Condition]:
        if batch.conditions is not None:
            return [self._on_device(c) for c in batch.conditions]
        sources = batch.sources or (None,) * len(batch.captions)
        prompts = [
            Prompt(self._trainer.format_prompt(caption), source)
            for caption, source in zip(batch.captions, sources, strict=True)
        ]
        self._cut_texts.tell_first(prompts)
        if self._options.trainee.trains_text_encoder:
            return self._trainer.encode_prompts(self.encoders.get(), prompts)  # with a graph to train through
        return self._encode(prompts)

    def _source_latents(self, batch: Batch) -> Sequence[Tensor | None]:
        """Return the latents (C, h, w) of what each picture of a batch is an edit of, or None."""
        if batch.source_latents is not None:
            device = self._processes.device
            return [None if s is None else s.to(device, non_blocking=True) for s in batch.source_latents]
        if batch.source_pixels is None:
            return [None] * len(batch.draws)
        encoded = iter(self._encode_pictures([s for s in batch.source_pixels if s is not None]))
        return [None if source is None else next(encoded) for source in batch.source_pixels]

    def _with_source(self, prompt: Prompt) -> Condition:
        """Return the condition of an encoded prompt with the latents of its source, each encoded once."""
        condition, source = self._prompts[prompt], prompt.source
        if source is None:
            return condition
        if source not in self._edited:
            (self._edited[source],) = self._encode_pictures([pixels_to_tensor(load_source(source))])
        return replace(condition, source_Chw=self._edited[source])

    def _encode_pictures(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Encode pictures, those of one size together."""
        device = self._processes.device
        latents: dict[int, Tensor] = {}
        with torch.no_grad():
            for shape in dict.fromkeys(picture.shape for picture in pixels):
                places = [place for place, picture in enumerate(pixels) if picture.shape == shape]
                batch_BCHW = torch.stack([pixels[place].to(device, non_blocking=True) for place in places])
                latents_BCHW = self._trainer.encode_images(self.vae.get(), batch_BCHW)
                latents |= zip(places, latents_BCHW.unbind(0), strict=True)
        return [latents[place] for place in range(len(pixels))]

    def _encode(self, prompts: Sequence[Prompt]) -> list[Condition]:
        with torch.no_grad():
            return self._trainer.encode_prompts(self.encoders.get(), list(prompts))

    def _load_text_encoder(self) -> Callable[[Sequence[Prompt]], list[Condition]]:
        self.encoders.get()
        return self._encode_counted

    def _encode_counted(self, prompts: Sequence[Prompt]) -> list[Condition]:
        self._cut_texts.count(prompts)
        return self._encode(prompts)

    def _tokens(self, text: str) -> int:
        return min(self._trainer.count_tokens(Prompt(text)))  # the text's, or as many as the encoder takes

    def _fill_texts(self, cache: TextCache, items: Sequence[Item]) -> None:
        size = self._trainer.texts_at_once(self._options.caching.text_encoder_batch_size)
        cache_texts(cache, items, self._load_text_encoder, self._pass_run(size), length=self._tokens)
        self.encoders.release()
        self._cut_texts.tell(self._processes)

    def _fill_latents(self, cache: LatentCache, items: Sequence[Item]) -> None:
        run = self._pass_run(self._options.caching.vae_batch_size)
        cache_latents(cache, items, self._load_autoencoder, run)
        self.vae.release()

    def _load_autoencoder(self) -> EncodePictures:
        vae, device = self.vae.get(), self._processes.device

        def encode(pixels_BCHW: Tensor) -> Tensor:
            return self._trainer.encode_images(vae, pixels_BCHW)

        if self._options.caching.vae_torch_compile:
            vae.to(memory_format=torch.channels_last)  # on CUDA torch's own group norm would undo it
            encode = part_compiler(ComputeOptions(torch_compile=True), symbolic=(0, 2, 3))(encode)
        return lambda pixels: encode(pixels.to(device, non_blocking=True))

    def _pass_run(self, batch_size: int) -> PassRun:
        processes = self._processes
        check = not self._options.caching.skip_cache_check
        return PassRun(
            batch_size,
            processes.rank,
            processes.world,
            processes.barrier,
            processes.gather,
            check=check,
            device=processes.device,
        )

    def _on_device(self, condition: Condition) -> Condition:
        device = self._processes.device
        return condition.map(lambda tensor: tensor.to(device, non_blocking=True))


def _latent_cache(options: TrainOptions, identities: CacheIdentities) -> LatentCache | None:
    if identities.latents is None:
        return None
    caching = options.caching
    place = CachePlace(caching.cache_latents_to_disk, caching.cache_directory, caching.cache_dtype)
    return LatentCache(place, identities.latents)


def _text_cache(trainer: NetworkTrainer, identities: CacheIdentities) -> TextCache | None:
    if identities.texts is None:
        return None
    caching = trainer.options.caching
    return TextCache(
        CachePlace(caching.cache_text_encoder_outputs_to_disk, caching.cache_directory, caching.cache_dtype),
        identities.texts,
        max_variants=caching.max_caption_variants,
        prompt_of=trainer.format_prompt,
        source_dropout=trainer.source_dropout(),
    )
