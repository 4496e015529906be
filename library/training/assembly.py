"""The parts of a run that need the model: loaded, made and joined once, in this order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from library.core.log import logger
from library.data.loader import BatchLoader, Caches
from library.nn.running.compiling import part_compiler
from library.nn.transformer import Transformer
from library.training.context import RunContext
from library.training.noising import Noising
from library.training.objective import Objective, Uniform
from library.training.output.ema import Ema
from library.training.output.saving import grid_path, metrics_path
from library.training.output.writer import Output
from library.training.rollout import Passes, RolloutGauge
from library.training.routing import Router, routing_lines
from library.training.sharding import Lockstep, shard
from library.training.state.contents import (
    Part,
    RunFacts,
    StateSaver,
    numbers_part,
    tensors_part,
)
from library.training.state.identity import dataset_digest
from library.training.state.stop import StopRequest
from library.training.state.stop_vote import StopVote
from library.training.trainee.kind import Trainee
from library.training.trainee.learner import Learner
from library.training.update import Gauge, Updater, UpdateSettings
from library.training.watch.gauges import SigmaBands, StepClock
from library.training.watch.grid import Grid
from library.training.watch.metrics import Metrics
from library.training.watch.trackers import make_trackers
from networks.module import apply_base_weights

_TEXT = 128  # tokens of the text for which savings are told; with another they hardly differ

_log = logger("run")


@dataclass(frozen=True)
class Assembly:
    """A run's parts. `ema` is None unless an average is kept."""

    model: nn.Module
    trainee: Trainee
    objective: Objective
    lockstep: Lockstep
    learner: Learner
    updater: Updater
    loader: BatchLoader
    ema: Ema | None
    output: Output
    grid: Grid
    metrics: Metrics
    clock: StepClock
    vote: StopVote
    states: StateSaver


def assemble(context: RunContext, stop: StopRequest) -> Assembly:
    """Load the model, make what is trained, make what the loop needs, and go back to a resumed state.

    A wish to stop keeps no one waiting for an upload.
    """
    options, inputs = context.options, context.inputs
    model = _load_model(context)
    trainee = _make_trainee(context, model)
    bands = SigmaBands(context.device, shared=context.processes.world > 1)
    vote = StopVote(stop.reason, context.device)
    noising = Noising(options, context.trainer.family, context.seed, _router(context, model))
    uniform = _shard(context, model, noising)
    rollouts = RolloutGauge(options.rollout, context.device) if options.rollout.on else None
    objective = Objective(
        *(context.trainer, model, trainee, inputs, noising),
        on_losses=bands.add,
        uniform=uniform,
        rollouts=rollouts,
    )
    lockstep = Lockstep(model, context.processes, objective.idle, uniform)
    learner = context.trainer.trainee_kind.learner(trainee, context)
    wanted: list[Gauge | None] = [bands, *learner.gauges, rollouts]
    wanted += [vote] if context.processes.world > 1 else []
    updater = Updater(
        objective,
        learner.gradients,
        learner.optimizer,
        context.processes,
        UpdateSettings(
            seed=context.seed,
            max_grad_norm=options.optimizer.max_grad_norm,
            scale_gradients=context.dtype == torch.float16,
            on_nan=options.state.on_nan,
        ),
        idle=lockstep.idle_step,
        gauges=[gauge for gauge in wanted if gauge is not None],
    )
    ema = _average(context, trainee, learner)
    output = Output(context, trainee, learner, ema, hurried=lambda: stop.reason() is not None)
    grid = Grid(grid_path(options.saving), options.saving.output_dir / "sample")
    metrics = _metrics(context)
    changing = dict(learner.parts)
    counting = {
        "updater": updater,
        "metrics": metrics,
        "files": output.periodic_save.retention,
        "grid": grid,
    }
    for name, part in counting.items():
        changing[name] = numbers_part(part.export_state, part.import_state)
    if ema is not None:
        changing["ema"] = tensors_part(ema.export_state, ema.import_state)
    return Assembly(
        model=model,
        trainee=trainee,
        objective=objective,
        lockstep=lockstep,
        learner=learner,
        updater=updater,
        loader=_loader(context, noising),
        ema=ema,
        output=output,
        grid=grid,
        metrics=metrics,
        clock=StepClock(),
        vote=vote,
        states=_states(context, changing),
    )


def _average(context: RunContext, trainee: Trainee, learner: Learner) -> Ema | None:
    options = context.options.ema
    if not options.ema:
        return None
    return Ema(trainee.named_parameters(), options, settle=learner.settle, exact=learner.exact)


def _loader(context: RunContext, noising: Noising) -> BatchLoader:
    """Return what loads the run's batches, with their noise."""
    caches = Caches(context.inputs.latent_cache, context.inputs.text_cache)
    settings = context.loader_settings()
    manifest = context.prepared.manifest
    return BatchLoader(manifest, context.plan, caches, settings, complete=noising.add_to)


def _load_model(context: RunContext) -> Transformer:
    compute = context.options.compute
    sharding = context.processes.sharding
    model = context.trainer.load_transformer(
        context.device, context.dtype, weights_on=None if sharding is None else torch.device("cpu")
    )
    keeps, every = compute.keeps, compute.checkpoint_every_n_blocks
    model.runner.keep(keeps, every=every, between=compute.keeps_between(keeps))
    if compute.compiles:
        model.runner.compile(part_compiler(compute))
    apply_base_weights(context.options.trainee, model)
    return model


def _shard(context: RunContext, model: nn.Module, noising: Noising) -> Uniform | None:
    """Spread the model over the processes if they were started so; return what every batch must do then."""
    processes = context.processes
    if processes.sharding is None:
        return None
    shard(model, processes.sharding, processes)
    items = context.prepared.manifest.items
    preserves = any(item.preserved for item in items)
    if not context.options.rollout.on:
        return Uniform(preserves)
    return Uniform(preserves, Passes(context.plan, context.prepared.manifest, noising))


def _router(context: RunContext, model: Transformer) -> Router | None:
    """Return what draws the tokens that skip blocks, and tell what that saves; None if none do."""
    tread, family = context.options.tread, context.trainer.family
    if not tread.tread_routes:
        return None
    image = max(map(family.image_tokens, context.plan.heaviest_batches[0]))
    steps = context.total_steps
    for line in routing_lines(model, tread, image=image, text=_TEXT, total_steps=steps):
        _log.info("%s", line)
    return Router.of(tread, model, family.patch, seed=context.seed, total_steps=steps)


def _make_trainee(context: RunContext, model: Transformer) -> Trainee:
    options = context.options

    def encoder_to_train() -> nn.Module:
        encoder = context.inputs.encoders.get()
        encoder.gradient_checkpointing = options.compute.gradient_checkpointing
        return encoder

    kind = context.trainer.trainee_kind
    return kind.make(options, model, encoder_to_train, seed=context.seed, device=context.device)


def _metrics(context: RunContext) -> Metrics:
    options, is_main = context.options, context.processes.is_main
    trackers = make_trackers(
        options.logging, metrics_path(options.saving), session=context.session_id, is_main=is_main
    )
    if options.logging.log_config:
        for tracker in trackers:
            tracker.config(context.config_text())
    return Metrics(
        trackers,
        total_steps=context.total_steps,
        window=context.plan.steps_per_epoch,
        shown=is_main,
        start=context.start.step,
    )


def _states(context: RunContext, changing: dict[str, Part]) -> StateSaver:
    """Return the keeper of states, after putting everything back as a resumed state says."""
    options, prepared = context.options, context.prepared
    facts = RunFacts(
        run=prepared.resumed.record.run if prepared.resumed else context.session_id,
        seed=context.seed,
        world=context.processes.world,
        steps_per_epoch=context.plan.steps_per_epoch,
        dataset=dataset_digest(prepared.manifest),
        settings=prepared.settings,
        history=context.start.history,
    )
    states = StateSaver(options.state, options.saving, facts, changing, total_epochs=context.total_epochs)
    if prepared.resumed is not None:
        states.restore(prepared.resumed)
    return states
