"""The events of a run: periodic files, validation, sample pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from library.data.batch import Condition
from library.data.prompt import Prompt
from library.data.prompt_files import load_sample_prompts, sources_of
from library.flow.generate import ImageModel
from library.options.request import ImageRequest
from library.training.assembly import Assembly
from library.training.context import RunContext
from library.training.events import Event
from library.training.guards import drawing_advice, memory_explained
from library.training.modes import switched_off
from library.training.state.stop import StopRequest
from library.training.validation import Validation, measured
from library.training.watch.preview import Look, Previews

Encoded = tuple[Sequence[Condition], Sequence[Condition]]


def events_of(context: RunContext, parts: Assembly, stop: StopRequest) -> list[Event]:
    """Return the events of a run. A wish to stop breaks off validation and previews."""
    return [
        parts.output.periodic_save,
        _validation(context, parts, stop),
        _previews(context, parts, stop),
    ]


def encode_sample_prompts(context: RunContext) -> None:
    """Encode the sample prompts ahead, while the text encoder has the memory to itself."""
    options = context.options
    if options.sampling.prompts is None or not context.processes.is_main:
        return
    if not options.trainee.trains_text_encoder:
        requests = load_sample_prompts(options.sampling.prompts, _defaults(context))
        _encode(context, requests)
        context.inputs.release_vae()


def _validation(context: RunContext, parts: Assembly, stop: StopRequest) -> Validation:
    options, manifest = context.options.validation, context.prepared.manifest
    items = [manifest.items[index] for index in manifest.validation]
    return Validation(
        options=options,
        items=measured(items, options.max_validation_steps),
        batches=parts.loader.held_out,
        inputs=context.inputs,
        objective=parts.objective,
        report=parts.metrics.log,
        modules=[parts.trainee, parts.model],
        processes=context.processes,
        stop=stop,
    )


def _previews(context: RunContext, parts: Assembly, stop: StopRequest) -> Previews:
    family, options = context.trainer.family, context.options
    explained = memory_explained("drawing a sample picture", context.device, drawing_advice(options))
    model = ImageModel(
        stop.interruptible(explained(parts.objective.velocity)),
        explained(context.inputs.decode),
        context.device,
        family.latent_channels,
        family.latent_stride,
        context.trainer.sampler_sigmas,
        sequential=options.sampling.sequential_cfg,
    )
    return Previews(
        options=options.sampling,
        folder=parts.grid.folder,
        name=options.saving.output_name,
        defaults=_defaults(context),
        model=model,
        encode=explained(lambda requests: _encode(context, requests)),
        modules=[parts.trainee, parts.model],
        grid=parts.grid,
        looks=_looks(context, parts),
        show=parts.metrics.picture,
    )


def _looks(context: RunContext, parts: Assembly) -> list[Look]:
    """Return the networks to draw sample pictures with."""
    drawn = "raw" if parts.ema is None else context.options.ema.ema_sample
    looks = []
    if context.options.sampling.sample_compare_base:
        looks.append(Look("base", lambda: switched_off(parts.trainee), once=True))
    if drawn in ("raw", "both"):
        looks.append(Look())
    if parts.ema is not None and drawn in ("ema", "both"):
        looks.append(Look("ema", parts.ema.in_place))
    return looks


def _defaults(context: RunContext) -> ImageRequest:
    sampler = context.options.sampling.sampler
    return replace(context.trainer.sample_defaults(), seed=context.seed, sampler=sampler)


def _encode(context: RunContext, requests: Sequence[ImageRequest]) -> Encoded:
    """Return the conditions of the prompts and of the negative prompts, which share their sources.

    Raises:
        ConfigError, DataError: a source cannot be used.
    """
    format_prompt = context.trainer.format_prompt
    pairs = list(zip(requests, sources_of(requests, edits=context.trainer.edits_pictures()), strict=True))
    prompts = [Prompt(format_prompt(request.prompt), source) for request, source in pairs]
    negatives = [
        Prompt(format_prompt(request.negative_prompt, negative=True), source) for request, source in pairs
    ]
    encoded = context.inputs.prompts(prompts + negatives)
    return encoded[: len(requests)], encoded[len(requests) :]
