"""A training run from prepared data to the saved network: read `run` and `_loop` first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.core.device import dtype_named, peak_memory_bytes
from library.core.dist import Processes, run_seed
from library.core.log import logger, setup_logging
from library.data.batch import Batch, Condition
from library.data.loader import BatchLoader, LoaderSettings, Sources
from library.data.plan import Plan
from library.data.prompts import load_sample_prompts
from library.flow.generate import ImageModel
from library.options.request import ImageRequest
from library.training.events import Event, Interval, Moment
from library.training.inputs import Inputs
from library.training.lr import lr_multiplier
from library.training.metadata import TrainingFacts
from library.training.metrics import Metrics, make_trackers
from library.training.objective import Objective
from library.training.optimizer import create_optimizer, describe_optimizer, set_lr
from library.training.prepare import Prepared
from library.training.preview import Previews
from library.training.saving import NetworkFile, PeriodicSave, final_path, metrics_path
from library.training.update import Share, Updater
from library.training.validation import Validation
from networks.module import make_network

if TYPE_CHECKING:
    from library.training.trainer import NetworkTrainer

_log = logger("run")


class TrainingRun:
    """One run: data, model, network, optimizer and events of a trainer, put together once and run once."""

    def __init__(self, trainer: NetworkTrainer, prepared: Prepared) -> None:
        options = trainer.options
        self.trainer, self.options, self.prepared = trainer, options, prepared
        self.started_at = time.time()
        self.session_id = str(int(self.started_at))
        self.processes = Processes.start(options.training.ddp_timeout)
        self.device = self.processes.device
        setup_logging(options.logging.console_log_level, is_main=self.processes.is_main)
        self.seed = run_seed(options.training.seed, self.processes)
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
        self.lr_multiplier = lr_multiplier(options.optimizer, self.total_steps)
        self.dtype = dtype_named(options.training.mixed_precision)
        self.inputs = Inputs(trainer, prepared.files, self.processes, self.dtype)

    def run(self) -> Path:
        """Fill the caches, load the model, train, save. Returns the saved network's path."""
        self._announce()
        self.inputs.fill_caches(self.prepared.manifest)
        if self.options.sampling.sample_prompts is not None and self.processes.is_main:
            self._encode_requests(
                self._sample_requests()
            )  # now, while the text encoder has the memory to itself
        self._build()
        try:
            self._loop()
        finally:
            self.metrics.close()
        path = final_path(self.options.saving)
        self._on_main(lambda: self.network_file.write(path, self._moment(self.total_steps)))
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
        _log.info("%s, %d process(es), model in %s", self.device, self.processes.world, self.dtype)

    def _build(self) -> None:
        """Load the model, put the network on it, and make everything that the loop needs."""
        options = self.options
        self.model = self.trainer.load_transformer(self.device, self.dtype)
        self.model.gradient_checkpointing = options.training.gradient_checkpointing
        self.network = make_network(options.network, self.model, self.seed)
        self.network.apply_to(self.model)
        self.network.train()
        self.objective = Objective(self.trainer, self.model, self.network, self.inputs, seed=self.seed)
        groups = self.network.parameter_groups(options.optimizer.learning_rate)
        self.optimizer = create_optimizer(groups, options.optimizer)
        self.updater = Updater(
            self.objective.training_losses,
            list(self.network.parameters()),
            self.optimizer,
            self.processes,
            seed=self.seed,
            max_grad_norm=options.optimizer.max_grad_norm,
            scale_gradients=self.dtype == torch.float16,
        )
        sources = Sources(self.inputs.latent_source, self.inputs.text_source)
        self.loader = BatchLoader(self.prepared.manifest, self.plan, sources, self._loader_settings())
        self.network_file = NetworkFile(self.network, self._facts(), options.saving.save_precision)
        trackers = make_trackers(
            options.logging,
            metrics_path(options.saving),
            session=self.session_id,
            is_main=self.processes.is_main,
        )
        self.metrics = Metrics(
            trackers,
            total_steps=self.total_steps,
            window=self.plan.steps_per_epoch,
            shown=self.processes.is_main,
        )

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
        return TrainingFacts(
            family=self.trainer.family,
            described=self.prepared.files.described,
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
            total_epochs=-(-self.total_steps // plan.steps_per_epoch),
            batches_per_epoch=plan.batches_per_epoch,
        )

    # --- the loop ---

    def _loop(self) -> None:
        """Train step by step; events happen between steps."""
        events = self._events()
        self._happen(events, self._moment(0))
        with closing(self.loader.batches(0, self.total_steps)) as batches:
            for step, shares in self._steps(batches):
                set_lr(self.optimizer, self.lr_multiplier(step))
                result = self.updater.step(step, shares)
                numbers = {"grad_norm": result.grad_norm} | self._learning_rates()
                self.metrics.step(step + 1, result.loss, numbers, peak_memory_bytes(self.device))
                self._happen(events, self._moment(step + 1))

    def _steps(self, batches: Iterator[tuple[int, int, Batch]]) -> Iterator[tuple[int, list[Share]]]:
        """Yield each step with this process's shares of its micro-batches."""
        for step, group in groupby(batches, key=lambda place: place[0]):
            totals = [len(micro.draws) for micro in self.plan.step(step)]
            yield step, [Share(batch, total) for (_, _, batch), total in zip(group, totals, strict=True)]

    def _happen(self, events: Sequence[Event], moment: Moment) -> None:
        """Run the events that are due, on the main process; the others wait."""
        due = [event for event in events if event.due(moment)]
        if due:
            self.network.multiplier = 1.0  # and not what the last batch's dataset said
            self._on_main(lambda: [event.run(moment) for event in due])
            self.inputs.release_vae()

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

    def _learning_rates(self) -> dict[str, float]:
        return {f"lr/{group['name']}": group["lr"] for group in self.optimizer.param_groups}

    # --- events ---

    def _events(self) -> list[Event]:
        return [
            PeriodicSave(self.options.saving, self.network_file.write),
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
            batch=self.loader.batch,
            inputs=self.inputs,
            objective=self.objective,
            report=self.metrics.log,
            modules=[self.network, self.model],
        )

    def _previews(self) -> Previews:
        family = self.trainer.family
        model = ImageModel(
            self.objective.velocity,
            self.inputs.decode,
            self.device,
            family.latent_channels,
            family.latent_stride,
        )
        return Previews(
            options=self.options.sampling,
            folder=self.options.saving.output_dir / "sample",
            name=self.options.saving.output_name,
            defaults=self._sample_defaults(),
            model=model,
            encode=self._encode_requests,
            modules=[self.network, self.model],
        )

    def _sample_defaults(self) -> ImageRequest:
        return ImageRequest(seed=self.seed, discrete_flow_shift=self.options.timesteps.discrete_flow_shift)

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
