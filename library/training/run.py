"""A training run from prepared data to the saved network: read `run` and `_loop` first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from itertools import groupby
from pathlib import Path

from library.core.device import forget_peak_memory, peak_memory_bytes
from library.core.errors import NonFiniteError, Stopped, StorageError
from library.core.files import sweep_leftovers, write_text
from library.core.log import logger
from library.data.batch import Batch
from library.nn.attention import prepare_kernel
from library.nn.running.compiling import check_compiler
from library.nn.weights.eight_bit import check_device
from library.training.assembly import Assembly, assemble
from library.training.context import RunContext
from library.training.events import Event, Moment
from library.training.guards import caching_advice, loading_advice, memory_explained, training_advice
from library.training.optim.lr import learning_rate_schedule
from library.training.optim.optimizer import evaluating, learning_rates, set_learning_rates
from library.training.output.saving import config_path, final_path
from library.training.sharding import check_sharding
from library.training.state.stop import StopRequest, StopSignals
from library.training.update import PartlyUpdatedError, Share, StepResult
from library.training.watchers import encode_sample_prompts, events_of

_log = logger("run")


class TrainingRun:
    """One run, from what was decided about it to the saved network."""

    parts: Assembly  # made by `run`, once the caches are filled

    def __init__(self, context: RunContext, signals: StopSignals) -> None:
        options = context.options
        self.context, self.options = context, options
        self.signals = signals
        stop_file = options.saving.output_dir / f"{options.saving.output_name}.stop"
        self.stop = StopRequest(signals, stop_file, options.state.max_train_minutes)
        self.broken_off = False  # whether events of this moment are left for the resumed run
        if context.processes.sharding is not None:
            check_sharding(options)
        context.trainer.trainee_kind.check_device(context)
        check_compiler(options.compute, context.device)
        prepare_kernel(options.compute.attention, context.device, context.dtype)
        if options.quant.quant_matmul and options.quant.transformer is not None:
            check_device(options.quant.transformer, context.device)
        self.schedule = learning_rate_schedule(options.optimizer, context.total_steps)

    def run(self) -> Path:
        """Fill the caches, load the model, train, save. Returns the saved network's path."""
        context, options, device = self.context, self.options, self.context.device
        path = final_path(options.saving)
        context.announce()
        if self._is_done(path):
            _log.info("all %d steps are done; raise --max_train_epochs to train on", context.total_steps)
            return path
        self._on_main(self._tidy_up)
        with memory_explained("encoding the dataset", device, caching_advice(options)):
            context.inputs.fill_caches(context.prepared.manifest)
            encode_sample_prompts(context)
        forget_peak_memory(device)  # what is told from here on is what training takes
        with memory_explained("loading the model", device, loading_advice(options)):
            self.parts = assemble(context, self.stop)
        try:
            with memory_explained("training", device, training_advice(options, context.prepared.manifest)):
                self._loop()
        finally:
            self.parts.metrics.close()
            self.parts.learner.gradients.close()
        self._on_main(lambda: self._save_result(path))
        _log.info("trained %d steps; saved %s", context.total_steps, path)
        return path

    def _is_done(self, path: Path) -> bool:
        start = self.context.start
        return start.step >= self.context.total_steps and not start.events_pending and path.exists()

    def _tidy_up(self) -> None:
        """Remove what a killed run left and an old wish to stop; keep the options beside the network."""
        sweep_leftovers(self.options.saving.output_dir)
        self.stop.stop_file.unlink(missing_ok=True)
        write_text(config_path(self.options.saving), self.context.config_text())

    # --- the loop ---

    def _loop(self) -> None:
        """Train step by step; events happen between steps, and there the run may stop."""
        context, parts, start = self.context, self.parts, self.context.start
        events = events_of(context, parts, self.stop)
        self.signals.defer = True
        if start.events_pending:
            self._happen(events, context.moment(start.step))
        with closing(parts.loader.batches(start.step, context.total_steps)) as batches:
            for step, shares in parts.clock.watch(self._steps(batches)):
                set_learning_rates(parts.learner.optimizer, self.schedule, step)
                result = self._update(step, shares)
                if parts.learner.norm_limit is not None:
                    parts.learner.norm_limit.apply()
                if parts.ema is not None:
                    parts.ema.update(step + 1)
                numbers = self._numbers(shares, result)
                parts.metrics.step(step + 1, result.loss, numbers, peak_memory_bytes(context.device))
                self._happen(events, context.moment(step + 1))
        if parts.learner.norm_limit is not None:
            parts.metrics.log(context.total_steps, parts.learner.norm_limit.last())

    def _steps(self, batches: Iterator[tuple[int, int, Batch]]) -> Iterator[tuple[int, list[Share]]]:
        """Yield each step with this process's shares of its micro-batches."""
        for step, group in groupby(batches, key=lambda place: place[0]):
            totals = [len(micro.draws) for micro in self.context.plan.step(step)]
            yield step, [Share(batch, total) for (_, _, batch), total in zip(group, totals, strict=True)]

    def _update(self, step: int, shares: Sequence[Share]) -> StepResult:
        """Run a step. One that fails, or is broken off, leaves a state of the moment before it."""
        # Several processes end their step first, because they stop together.
        between = self.stop.check if self.context.processes.world == 1 else None
        try:
            return self.parts.updater.step(step, shares, between=between)
        except PartlyUpdatedError:
            raise  # this is a moment at which no run ever is
        except NonFiniteError as error:
            try:
                kept = self._keep_moment_before(step)
            except StorageError as refused:  # the cause of the end stays the first thing that went wrong
                kept = str(refused)
            raise NonFiniteError(f"{error} {kept}") from error
        except Stopped as wish:
            kept = self._keep_moment_before(step)
            self.stop.stop_file.unlink(missing_ok=True)
            raise Stopped(f"Stopped by {wish} in step {step + 1}. {kept}") from wish

    def _keep_moment_before(self, step: int) -> str:
        """Save a state of the moment before a step, unless the run began there; return what to say of it."""
        if step == self.context.start.step:
            return "It was the first one, so there is nothing new to keep."
        self._on_main(lambda: self._save_state(self.context.moment(step)))
        return "A state of the moment before it is saved; --resume latest goes on from there."

    def _numbers(self, shares: Sequence[Share], result: StepResult) -> dict[str, float]:
        """Return what is recorded of a step beside its loss."""
        parts = self.parts
        pictures = sum(share.total for share in shares)
        grad_norm = {"grad_norm": result.grad_norm}
        return (
            grad_norm | learning_rates(parts.learner.optimizer) | result.gauged | parts.clock.read(pictures)
        )

    # --- between steps ---

    def _happen(self, events: Sequence[Event], moment: Moment) -> None:
        """Run the events that are due; then keep the state."""
        due = [event for event in events if event.due(moment)]
        if due:
            self._run_events(due, moment)
            self.context.inputs.release_vae()
        self._keep_state(moment)

    def _run_events(self, due: Sequence[Event], moment: Moment) -> None:
        """Run events: shared ones on all processes, the others on the main one, while the rest wait."""
        processes = self.context.processes
        self.parts.learner.settle()  # what evaluates may put other weights in place
        with evaluating(self.parts.learner.optimizer):
            for event in due:
                self.parts.trainee.multiplier = 1.0  # not what the last batch's dataset said
                broken_off = False
                with nullcontext() if event.shared else self.parts.lockstep.free():
                    if event.shared or processes.is_main:
                        try:
                            event.run(moment)
                        except Stopped:
                            broken_off = True
                        self.parts.learner.settle()
                if processes.any(broken_off):
                    self.broken_off = True  # a preview or validation: done again when the run is resumed
                    return

    def _keep_state(self, moment: Moment) -> None:
        """Save the state if that is due. If the run should stop, save it in any case, and leave.

        Raises:
            Stopped: the run should stop; on every process, if one of them was asked to.
        """
        reason = self.stop.reason()
        asked = reason is not None if self.context.processes.world == 1 else self.parts.vote.wished
        leaving = self.broken_off or (asked and not moment.run_ended)  # the same on every process
        states = self.parts.states
        if leaving:
            self._on_main(lambda: self._save_state(moment))
        elif states.due(moment):
            self._on_main(lambda: self._try_to_save(lambda: self._save_state(moment)))
        elif states.overdue() and self.context.processes.is_main and not moment.run_ended:
            # The clocks of the other processes may differ: they go on, and wait in their next exchange.
            self._try_to_save(lambda: states.save(moment))
        if leaving:
            self._on_main(lambda: self.stop.stop_file.unlink(missing_ok=True))
            by = next(filter(None, self.context.processes.gather(reason)), "a wish to stop")
            raise Stopped(f"Stopped by {by} after step {moment.step}; --resume latest goes on from there.")

    def _save_state(self, moment: Moment) -> None:
        parts = self.parts
        parts.output.take_states(parts.states.save(moment, events_done=not self.broken_off))

    def _try_to_save(self, save: Callable[[], object]) -> None:
        """Save a state; without room for it training goes on, as a later one may find room."""
        try:
            save()
        except StorageError as error:
            _log.warning("%s Training goes on, and the next state is tried when it is due.", error)

    def _save_result(self, path: Path) -> None:
        parts, total_steps = self.parts, self.context.total_steps
        with evaluating(parts.learner.optimizer):
            parts.output.write(path, self.context.moment(total_steps))
        parts.output.take_states(parts.states.save_final(total_steps))
        parts.output.close()

    def _on_main(self, action: Callable[[], object]) -> None:
        if self.context.processes.is_main:
            action()
        self.context.processes.barrier()
