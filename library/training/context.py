"""What is decided about a run before a model is loaded: processes, seed, order of data, where it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from library.core.device import before_ampere, dtype_named
from library.core.dist import Processes, run_seed
from library.core.log import logger
from library.data.loader import LoaderSettings
from library.data.plan import Plan
from library.nn.kernels import uses_triton
from library.nn.triton_kernels.choice import use_fused_kernels
from library.options.config_file import config_text
from library.options.train import TrainOptions
from library.training.events import Moment
from library.training.inputs import Inputs
from library.training.output.saving import final_path
from library.training.prepare import Prepared
from library.training.state.resume import Start, plan_start, require_one_start

if TYPE_CHECKING:
    from library.training.trainer import NetworkTrainer

_log = logger("run")


@dataclass(frozen=True)
class RunContext:
    """One run's fixed facts. `started_at`: seconds since 1970. `start`: the step to begin with, and why."""

    trainer: NetworkTrainer
    prepared: Prepared
    processes: Processes
    seed: int
    plan: Plan
    total_steps: int
    start: Start
    dtype: torch.dtype
    inputs: Inputs
    started_at: float

    @classmethod
    def decide(cls, trainer: NetworkTrainer, prepared: Prepared) -> RunContext:
        """Join the other processes and agree with them on the run.

        Raises:
            ConfigError: as `plan_start` and `use_fused_kernels`.
            MissingPackageError: as the latter.
        """
        options, resumed = trainer.options, prepared.resumed
        processes = Processes.start(options.training.ddp_timeout)
        options.logging.set_up(is_main=processes.is_main)
        dtype = dtype_named(options.training.mixed_precision)
        obstacle = use_fused_kernels(options.compute.kernels, processes.device, dtype)
        if obstacle is not None:
            _log.info("torch computes norms and gates, and not Triton: %s", obstacle)
        elif uses_triton():
            _log.info("kernels of Triton compute norms and gates; --fused_kernels torch leaves that to torch")
        if dtype == torch.bfloat16 and before_ampere(processes.device):
            _log.warning(
                "this GPU has no instructions for bf16, which makes steps many times slower than in fp16: "
                "--mixed_precision fp16 is made for it, as long as nothing overflows (exit code 70). Or give "
                "--no_half_vae, as the autoencoder's attention takes much memory in bf16 there"
            )
        require_one_start(processes, resumed)
        seed = resumed.record.seed if resumed else run_seed(options.training.seed, processes)
        accumulation = options.training.gradient_accumulation_steps
        plan = Plan(
            prepared.manifest,
            seed=seed,
            world=processes.world,
            accumulation=accumulation,
            budget=trainer.token_budget,
        )
        epochs = options.training.max_train_epochs
        steps = options.training.max_train_steps if epochs is None else epochs * plan.steps_per_epoch
        return cls(
            trainer=trainer,
            prepared=prepared,
            processes=processes,
            seed=seed,
            plan=plan,
            total_steps=steps,
            start=plan_start(options, resumed, prepared.changes, plan, steps),
            dtype=dtype,
            inputs=Inputs(trainer, prepared.identities, processes, dtype),
            started_at=time.time(),
        )

    @property
    def options(self) -> TrainOptions:
        """The run's options."""
        return self.trainer.options

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.processes.device

    @property
    def session_id(self) -> str:
        """Tells this run apart from others that share its files."""
        return str(int(self.started_at))

    @property
    def total_epochs(self) -> int:
        """Epochs in the whole run, the last perhaps not whole."""
        return -(-self.total_steps // self.plan.steps_per_epoch)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about what is hardly meant so."""
        path, replaced = final_path(self.options.saving), []
        if self.prepared.resumed is None and path.exists():
            replaced.append(
                f"{path} is there already, and this run replaces it when it ends; to keep it, give another "
                f"--output_name or --output_dir"
            )
        return (*self.prepared.manifest.warnings, *self.prepared.warnings, *replaced)

    def moment(self, step: int) -> Moment:
        """Return the moment after `step` steps."""
        epochs, rest = divmod(step, self.plan.steps_per_epoch)
        return Moment(
            step=step,
            epoch=epochs + (rest > 0),
            epoch_ended=step > 0 and rest == 0,
            run_ended=step == self.total_steps,
        )

    def config_text(self) -> str:
        """Return the options as TOML, with the seed that was drawn, to repeat the run from."""
        training = replace(self.options.training, seed=self.seed)
        return config_text(replace(self.options, training=training))

    def loader_settings(self) -> LoaderSettings:
        """Return how this process's batches are made."""
        training = self.options.training
        return LoaderSettings(
            seed=self.seed,
            total_steps=self.total_steps,
            rank=self.processes.rank,
            workers=training.max_data_loader_n_workers,
            latent_stride=self.trainer.family.latent_stride,
            prior_loss_weight=training.prior_loss_weight,
            source_dropout=self.trainer.source_dropout(),
            device=self.device,
        )

    def announce(self) -> None:
        """Tell what will be done."""
        manifest, plan = self.prepared.manifest, self.plan
        _log.info(
            "%d pictures to train on, %d held out; %d batches and %d steps an epoch, %d steps; seed %d",
            *(len(manifest.train), len(manifest.validation)),
            *(plan.batches_per_epoch, plan.steps_per_epoch, self.total_steps, self.seed),
        )
        for sentence in manifest.skipped:
            _log.warning("left out: %s", sentence)
        for sentence in self.warnings:
            _log.warning("%s", sentence)
        for sentence in (*self.prepared.adjustments, *manifest.notes, *self.start.sentences):
            _log.info("%s", sentence)
        _log.info("%s, %d process(es), model in %s", self.device, self.processes.world, self.dtype)
