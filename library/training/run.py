"""A training run from prepared data to the saved network: read `run` and `_loop` first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.core.device import dtype_named, peak_memory_bytes
from library.core.dist import Processes, run_seed
from library.core.errors import NonFiniteError, Stopped
from library.core.files import sweep_leftovers, write_text
from library.core.log import logger, setup_logging
from library.data.batch import Batch, Condition
from library.data.loader import BatchLoader, LoaderSettings, Sources
from library.data.plan import Plan
from library.data.prompts import load_sample_prompts
from library.flow.generate import ImageModel
from library.options.config_file import config_text
from library.options.request import ImageRequest
from library.training.ema import Ema
from library.training.events import Event, Interval, Moment
from library.training.gauges import SigmaBands, StepClock, weight_norms
from library.training.grid import Grid
from library.training.guards import (
    caching_advice,
    drawing_advice,
    loading_advice,
    memory_explained,
    training_advice,
)
from library.training.hub import Uploads
from library.training.identity import dataset_digest, settings_of
from library.training.inputs import Inputs
from library.training.lr import learning_rate_schedule
from library.training.metadata import TrainingFacts
from library.training.metrics import Metrics
from library.training.objective import Objective
from library.training.optimizer import (
    check_optimizer,
    create_optimizer,
    describe_optimizer,
    evaluating,
    learning_rates,
    set_learning_rates,
)
from library.training.prepare import Prepared
from library.training.preview import Look, Previews, switched_off
from library.training.resume import plan_start
from library.training.saving import (
    NetworkFile,
    PeriodicSave,
    config_path,
    final_path,
    grid_path,
    metrics_path,
)
from library.training.state import (
    Part,
    RunFacts,
    StateSaver,
    numbers_part,
    optimizer_part,
    tensors_part,
    weights_part,
)
from library.training.stop import StopRequest, StopSignals
from library.training.trackers import make_trackers
from library.training.update import Share, StepResult, Updater
from library.training.validation import Validation
from networks.module import apply_base_weights, install_network, network_facts

if TYPE_CHECKING:
    from library.training.trainer import NetworkTrainer

_log = logger("run")


class TrainingRun:
    """One run: data, model, network, optimizer and events of a trainer, put together once and run once."""

    def __init__(self, trainer: NetworkTrainer, prepared: Prepared, signals: StopSignals) -> None:
        options = trainer.options
        self.trainer, self.options, self.prepared = trainer, options, prepared
        self.started_at = time.time()
        self.session_id = str(int(self.started_at))
        self.processes = Processes.start(options.training.ddp_timeout)
        self.device = self.processes.device
        setup_logging(
            options.logging.console_log_level,
            is_main=self.processes.is_main,
            file=options.logging.console_log_file,
            simple=options.logging.console_log_simple,
        )
        resumed = prepared.resumed
        self.seed = resumed.record.seed if resumed else run_seed(options.training.seed, self.processes)
        self.plan = Plan(
            prepared.manifest,
            seed=self.seed,
            world=self.processes.world,
            accumulation=options.training.gradient_accumulation_steps,
        )
        epochs = options.training.max_train_epochs
        self.total_steps = (
            options.training.max_train_steps if epochs is None else epochs * self.plan.steps_per_epoch
        )
        self.start = plan_start(options, resumed, prepared.changes, self.plan, self.total_steps)
        self.signals = signals
        stop_file = options.saving.output_dir / f"{options.saving.output_name}.stop"
        self.stop = StopRequest(signals, stop_file, options.state.max_train_minutes)
        self.broken_off = False  # whether events of this moment are left for the resumed run
        check_optimizer(options.optimizer, self.device)
        self.schedule = learning_rate_schedule(options.optimizer, self.total_steps)
        self.dtype = dtype_named(options.training.mixed_precision)
        self.inputs = Inputs(trainer, prepared.files, self.processes, self.dtype)

    def run(self) -> Path:
        """Fill the caches, load the model, train, save. Returns the saved network's path."""
        options, path = self.options, final_path(self.options.saving)
        self._announce()
        if self.start.step >= self.total_steps and not self.start.events_pending and path.exists():
            _log.info("all %d steps are done; raise --max_train_epochs to train on", self.total_steps)
            return path
        self._on_main(self._tidy_up)
        self._on_main(self._write_config)
        with memory_explained("encoding the dataset", self.device, caching_advice(options)):
            self.inputs.fill_caches(self.prepared.manifest)
            kept = not options.network.trains_text_encoder  # else they change, and are encoded anew each time
            if kept and options.sampling.sample_prompts is not None and self.processes.is_main:
                # Now, while the text encoder has the memory to itself.
                self._encode_requests(self._sample_requests())
        with memory_explained("loading the model", self.device, loading_advice(options)):
            self._build()
        advice = training_advice(options, self.prepared.manifest)
        try:
            with memory_explained("training", self.device, advice):
                self._loop()
        finally:
            self.metrics.close()
        self._on_main(lambda: self._save_result(path))
        _log.info("trained %d steps; saved %s", self.total_steps, path)
        return path

    # --- before the loop ---

    def _announce(self) -> None:
        manifest = self.prepared.manifest
        _log.info(
            "%d pictures to train on, %d held out; %d batches and %d steps an epoch, %d steps; seed %d",
            *(len(manifest.train), len(manifest.validation)),
            *(self.plan.batches_per_epoch, self.plan.steps_per_epoch, self.total_steps, self.seed),
        )
        for sentence in manifest.skipped:
            _log.warning("left out: %s", sentence)
        for sentence in manifest.notes:
            _log.info("%s", sentence)
        for sentence in self.start.sentences:
            _log.info("%s", sentence)
        _log.info("%s, %d process(es), model in %s", self.device, self.processes.world, self.dtype)

    def _write_config(self) -> None:
        """Keep the options beside the network, to repeat the run from."""
        write_text(config_path(self.options.saving), self._config_text())

    def _config_text(self) -> str:
        """The options as TOML, with the seed that was drawn."""
        training = replace(self.options.training, seed=self.seed)
        return config_text(replace(self.options, training=training))

    def _build(self) -> None:
        """Load the model, put the network on it, and make everything that the loop needs."""
        options = self.options
        self.model = self.trainer.load_transformer(self.device, self.dtype)
        self.model.gradient_checkpointing = options.training.gradient_checkpointing
        self.model.offload_checkpoints = options.training.cpu_offload_checkpointing
        apply_base_weights(options.network, self.model)
        self.network = install_network(
            options.network,
            self.model,
            self._encoder_to_train,
            seed=self.seed,
            learning_rate=options.optimizer.learning_rate,
        )
        self.network.train()
        if options.training.full_bf16:
            for parameter in self.network.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        self.clock, self.bands = StepClock(), SigmaBands(self.processes)
        self.objective = Objective(
            self.trainer, self.model, self.network, self.inputs, seed=self.seed, on_losses=self.bands.add
        )
        groups = self.network.parameter_groups(options.optimizer.network_lr)
        self.optimizer = create_optimizer(groups, options.optimizer)
        self.updater = Updater(
            self.objective,
            list(self.network.parameters()),
            self.optimizer,
            self.processes,
            seed=self.seed,
            max_grad_norm=options.optimizer.max_grad_norm,
            scale_gradients=self.dtype == torch.float16,
            on_nan=options.state.on_nan,
        )
        sources = Sources(self.inputs.latent_source, self.inputs.text_source)
        self.loader = BatchLoader(self.prepared.manifest, self.plan, sources, self._loader_settings())
        self.ema = Ema(self.network.named_parameters(), options.ema) if options.ema.ema else None
        self.network_file = NetworkFile(self.network, self._facts(), options.saving.save_precision, self.ema)
        uploading = options.hub.huggingface_repo_id is not None and self.processes.is_main
        self.uploads = Uploads(options.hub) if uploading else None
        self.periodic_save = PeriodicSave(
            options.saving, self._write_network, total_epochs=self._total_epochs
        )
        self.grid = Grid(grid_path(options.saving), options.saving.output_dir / "sample")
        trackers = make_trackers(
            options.logging,
            metrics_path(options.saving),
            session=self.session_id,
            is_main=self.processes.is_main,
        )
        if options.logging.log_config:
            for tracker in trackers:
                tracker.config(self._config_text())
        self.metrics = Metrics(
            trackers,
            total_steps=self.total_steps,
            window=self.plan.steps_per_epoch,
            shown=self.processes.is_main,
            start=self.start.step,
        )
        self.states = StateSaver(
            options.state, options.saving, self._run_facts(), self._parts(), total_epochs=self._total_epochs
        )
        if self.prepared.resumed is not None:
            self.states.restore(self.prepared.resumed)

    def _encoder_to_train(self) -> nn.Module:
        encoder = self.inputs.encoders.get()
        encoder.gradient_checkpointing = self.options.training.gradient_checkpointing
        return encoder

    def _loader_settings(self) -> LoaderSettings:
        training = self.options.training
        return LoaderSettings(
            seed=self.seed,
            total_steps=self.total_steps,
            rank=self.processes.rank,
            world=self.processes.world,
            workers=training.max_data_loader_n_workers,
            latent_stride=self.trainer.family.latent_stride,
            prior_loss_weight=training.prior_loss_weight,
            pin_memory=self.device.type == "cuda",
        )

    def _facts(self) -> TrainingFacts:
        options, plan = self.options, self.plan
        sizes = network_facts(self.network) if options.network.dim_from_weights else {}
        return TrainingFacts(
            family=self.trainer.family,
            described={**self.prepared.files.described, **sizes},
            manifest=self.prepared.manifest,
            network=options.network,
            metadata=options.metadata,
            recorded=self.trainer.recorded_options(),
            output_name=options.saving.output_name,
            optimizer=describe_optimizer(self.optimizer, options.optimizer),
            seed=self.seed,
            session_id=self.session_id,
            started_at=self.started_at,
            total_steps=self.total_steps,
            total_epochs=self._total_epochs,
            batches_per_epoch=plan.batches_per_epoch,
        )

    def _run_facts(self) -> RunFacts:
        return RunFacts(
            seed=self.seed,
            world=self.processes.world,
            steps_per_epoch=self.plan.steps_per_epoch,
            dataset=dataset_digest(self.prepared.manifest),
            settings=settings_of(self.options, self.prepared.files.described, self.prepared.manifest),
            history=self.start.history,
        )

    def _parts(self) -> dict[str, Part]:
        """Return all that training changes, for the states."""
        retention = self.periodic_save.retention
        parts = {
            "network": weights_part(self.network),
            "optimizer": optimizer_part(self.optimizer),
            "updater": numbers_part(self.updater.export_state, self.updater.import_state),
            "metrics": numbers_part(self.metrics.export_state, self.metrics.import_state),
            "files": numbers_part(retention.export_state, retention.import_state),
            "grid": numbers_part(self.grid.export_state, self.grid.import_state),
        }
        if self.ema is not None:
            parts["ema"] = tensors_part(self.ema.export_state, self.ema.import_state)
        return parts

    def _tidy_up(self) -> None:
        """Remove what a killed run left behind, and a wish to stop that was meant for an earlier one."""
        sweep_leftovers(self.options.saving.output_dir)
        self.stop.stop_file.unlink(missing_ok=True)

    @property
    def _total_epochs(self) -> int:
        return -(-self.total_steps // self.plan.steps_per_epoch)

    # --- the loop ---

    def _loop(self) -> None:
        """Train step by step; events happen between steps, and there the run may stop."""
        events = self._events()
        self.signals.defer = True
        if self.start.events_pending:
            self._happen(events, self._moment(self.start.step))
        with closing(self.loader.batches(self.start.step, self.total_steps)) as batches:
            for step, shares in self.clock.watch(self._steps(batches)):
                set_learning_rates(self.optimizer, self.schedule, step)
                result = self._update(step, shares)
                norms = self._limit_norms()
                if self.ema is not None:
                    self.ema.update(step + 1)
                numbers = self._numbers(step, result) | norms
                self.metrics.step(step + 1, result.loss, numbers, peak_memory_bytes(self.device))
                self._happen(events, self._moment(step + 1))

    def _limit_norms(self) -> dict[str, float]:
        """Apply --scale_weight_norms; return its numbers under the names of the reference tool."""
        limit = self.options.network.scale_weight_norms
        if limit is None:
            return {}
        done = self.network.apply_max_norm(limit)
        return {
            "max_norm/keys_scaled": done.scaled,
            "max_norm/average_key_norm": done.average,
            "max_norm/max_key_norm": done.largest,
        }

    def _steps(self, batches: Iterator[tuple[int, int, Batch]]) -> Iterator[tuple[int, list[Share]]]:
        """Yield each step with this process's shares of its micro-batches."""
        for step, group in groupby(batches, key=lambda place: place[0]):
            totals = [len(micro.draws) for micro in self.plan.step(step)]
            yield step, [Share(batch, total) for (_, _, batch), total in zip(group, totals, strict=True)]

    def _update(self, step: int, shares: Sequence[Share]) -> StepResult:
        try:
            return self.updater.step(step, shares)
        except NonFiniteError as error:
            if step == self.start.step:
                raise
            self._on_main(lambda: self.states.save(self._moment(step)))
            raise NonFiniteError(f"{error} A state of the moment before it is saved.") from error

    def _happen(self, events: Sequence[Event], moment: Moment) -> None:
        """Run the events that are due, on the main process while the others wait; then keep the state."""
        due = [event for event in events if event.due(moment)]
        if due:
            self._on_main(lambda: self._run_events(due, moment))
            self.inputs.release_vae()
        self._keep_state(moment)

    def _run_events(self, due: Sequence[Event], moment: Moment) -> None:
        try:
            with evaluating(self.optimizer):
                for event in due:
                    self.network.multiplier = 1.0  # not what the last batch's dataset said, or validation's
                    event.run(moment)
        except Stopped:
            self.broken_off = True  # a preview or validation: done again when the run is resumed

    def _keep_state(self, moment: Moment) -> None:
        """Save the state if that is due. If the run should stop, save it in any case, and leave.

        Raises:
            Stopped: the run should stop; on every process, if one of them was asked to.
        """
        reason = self.stop.reason()
        leaving = self.processes.any(self.broken_off or (reason is not None and not moment.run_ended))
        if leaving or self.states.due(moment):
            self._on_main(lambda: self._save_state(moment))
        if leaving:
            self._on_main(lambda: self.stop.stop_file.unlink(missing_ok=True))
            by = reason or "a wish of another process"
            raise Stopped(f"Stopped by {by} after step {moment.step}; --resume latest goes on from there.")

    def _write_network(self, path: Path, moment: Moment) -> list[Path]:
        files = self.network_file.write(path, moment)
        if self.uploads is not None:
            self.uploads.files(files)
        return files

    def _save_state(self, moment: Moment) -> None:
        self._upload_states(self.states.save(moment, events_done=not self.broken_off))

    def _upload_states(self, folders: Sequence[Path]) -> None:
        if self.uploads is not None and self.options.hub.save_state_to_huggingface:
            for folder in folders:
                self.uploads.folder(folder)

    def _save_result(self, path: Path) -> None:
        with evaluating(self.optimizer):
            self._write_network(path, self._moment(self.total_steps))
        self._upload_states(self.states.save_final(self.total_steps))
        if self.uploads is not None:
            self.uploads.close()

    def _on_main(self, action) -> None:
        if self.processes.is_main:
            action()
        self.processes.barrier()

    def _moment(self, step: int) -> Moment:
        epochs, rest = divmod(step, self.plan.steps_per_epoch)
        return Moment(
            step=step,
            epoch=epochs + (rest > 0),
            epoch_ended=step > 0 and rest == 0,
            run_ended=step == self.total_steps,
        )

    def _numbers(self, step: int, result: StepResult) -> dict[str, float]:
        """Return what is recorded of a step beside its loss. Every process has to ask."""
        bands, norms = self.bands.read(), weight_norms(self.network)
        pictures = sum(len(micro.draws) for micro in self.plan.step(step))
        grad_norm = {"grad_norm": result.grad_norm}
        return grad_norm | learning_rates(self.optimizer) | bands | norms | self.clock.read(pictures)

    # --- events ---

    def _events(self) -> list[Event]:
        return [
            self.periodic_save,
            self._validation(),
            self._previews(),
        ]

    def _validation(self) -> Validation:
        options, manifest = self.options.validation, self.prepared.manifest
        every = options.validate_every_n_epochs
        if every is None and options.validate_every_n_steps is None:
            every = 1
        return Validation(
            interval=Interval(options.validate_every_n_steps, every),
            items=[manifest.items[i] for i in manifest.validation],
            max_batches=options.max_validation_steps,
            batch=self.stop.interruptible(self.loader.batch),
            inputs=self.inputs,
            objective=self.objective,
            report=self.metrics.log,
            modules=[self.network, self.model],
        )

    def _previews(self) -> Previews:
        family = self.trainer.family
        explained = memory_explained("drawing a sample picture", self.device, drawing_advice(self.options))
        model = ImageModel(
            self.stop.interruptible(explained(self.objective.velocity)),
            explained(self.inputs.decode),
            self.device,
            family.latent_channels,
            family.latent_stride,
        )
        return Previews(
            options=self.options.sampling,
            folder=self.grid.folder,
            name=self.options.saving.output_name,
            defaults=self._sample_defaults(),
            model=model,
            encode=self._encode_requests,
            modules=[self.network, self.model],
            grid=self.grid,
            looks=self._looks(),
            show=self.metrics.picture,
        )

    def _looks(self) -> list[Look]:
        """Return the networks to draw sample pictures with."""
        drawn = "raw" if self.ema is None else self.options.ema.ema_sample
        looks = []
        if self.options.sampling.sample_compare_base:
            looks.append(Look("base", lambda: switched_off(self.network), once=True))
        if drawn in ("raw", "both"):
            looks.append(Look())
        if self.ema is not None and drawn in ("ema", "both"):
            looks.append(Look("ema", self.ema.in_place))
        return looks

    def _sample_defaults(self) -> ImageRequest:
        return ImageRequest(
            seed=self.seed,
            discrete_flow_shift=self.options.timesteps.discrete_flow_shift,
            sampler=self.options.sampling.sample_sampler,
        )

    def _sample_requests(self) -> list[ImageRequest]:
        return load_sample_prompts(self.options.sampling.sample_prompts, self._sample_defaults())

    def _encode_requests(
        self, requests: Sequence[ImageRequest]
    ) -> tuple[Sequence[Condition], Sequence[Condition]]:
        """Return the conditions of the prompts and of the negative prompts."""
        prompts = [self.trainer.format_prompt(request.prompt) for request in requests]
        negatives = [self.trainer.format_prompt(r.negative_prompt, negative=True) for r in requests]
        encoded = self.inputs.prompts(prompts + negatives)
        return encoded[: len(requests)], encoded[len(requests) :]
