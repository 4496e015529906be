"""Where a run starts: at the beginning, in the middle because it is told to, or where a state left off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import ConfigError
from library.data.plan import Plan
from library.options.state import LATEST
from library.options.train import TrainOptions
from library.training.state.checkpoint import SavedState

if TYPE_CHECKING:
    from library.core.dist import Processes


@dataclass(frozen=True)
class Start:
    """step: the first to train, from 0. events_pending: whether what happens before it is still to be done.

    sentences: what to tell the user. history: a sentence for each change on the way here, for the next state.
    """

    step: int
    events_pending: bool
    sentences: tuple[str, ...] = ()
    history: tuple[str, ...] = ()


def plan_start(
    options: TrainOptions, resumed: SavedState | None, changes: tuple[str, ...], plan: Plan, total_steps: int
) -> Start:
    """Decide where to start.

    Args:
        changes: sentences about settings that are not what they were in the resumed run.

    Raises:
        ConfigError: `--initial_step`, `--initial_epoch` or the state lies behind the end of the run.
    """
    step = _chosen_step(options, plan)
    if step is not None and step >= total_steps:
        raise ConfigError(
            f"the run would start after step {step} (--initial_step, --initial_epoch), but it ends after "
            f"step {total_steps}; train for longer or start earlier."
        )
    if resumed is None:
        return _first_start(options, step or 0, total_steps)
    record = resumed.record
    changes += _changes_of_pace(resumed, plan)
    if step is None:
        step, events_pending = _same_place(options, resumed, plan), not record.events_done
        if step > total_steps:
            raise ConfigError(
                f"{resumed.path} is a state after step {step}, but the run ends after step {total_steps}; "
                f"raise --max_train_steps or --max_train_epochs, or go on from an earlier state."
            )
        told = f"going on from {resumed.path}, after step {step} of {total_steps}"
    else:
        events_pending = False
        told = (
            f"going on from {resumed.path} (step {record.step}) as if {step} of {total_steps} steps were done"
        )
    history = (*record.history, *(f"after step {step}: {change}" for change in changes))
    return Start(step, events_pending, (told, *changes), history)


def require_one_start(processes: Processes, resumed: SavedState | None) -> None:
    """Raise ConfigError unless all processes go on from the same state, or all from none."""
    record = None if resumed is None else resumed.record
    found = processes.gather(None if record is None else (record.run, record.serial, record.step))
    if found.count(found[0]) < len(found):
        own = "none" if resumed is None else str(resumed.path)
        raise ConfigError(
            f"--resume: the processes find different states (process {processes.rank}: {own}). All machines "
            f"must see the same --output_dir."
        )


def _chosen_step(options: TrainOptions, plan: Plan) -> int | None:
    """Return the start that the options name; None if they name none."""
    state = options.state
    if state.initial_step is not None:
        return state.initial_step
    return None if state.initial_epoch is None else (state.initial_epoch - 1) * plan.steps_per_epoch


def _first_start(options: TrainOptions, step: int, total_steps: int) -> Start:
    told = []
    if options.state.resume == LATEST:
        told.append(f"there is no state of '{options.saving.output_name}' yet, so the run starts anew")
    if step > 0:
        told.append(f"starting as if {step} of {total_steps} steps were done, with new weights and optimizer")
    return Start(step, events_pending=step == 0, sentences=tuple(told))


def _same_place(options: TrainOptions, resumed: SavedState, plan: Plan) -> int:
    """Return the step to go on with: in a run measured in epochs the same place in its epochs, else the same
    step. They differ only if an epoch has another number of steps now."""
    record = resumed.record
    if options.training.max_train_epochs is None:
        return record.step
    return record.step * plan.steps_per_epoch // record.steps_per_epoch


def _changes_of_pace(resumed: SavedState, plan: Plan) -> tuple[str, ...]:
    record = resumed.record
    changes = []
    if plan.world != record.world:
        changes.append(
            f"{plan.world} process(es) instead of {record.world}: a batch of a dataset is "
            f"{plan.world / record.world:g} times as large"
        )
    if plan.steps_per_epoch != record.steps_per_epoch:
        changes.append(
            f"an epoch has {plan.steps_per_epoch} steps instead of {record.steps_per_epoch}; the run goes on "
            f"at the same place in its epochs with --max_train_epochs, else at the same step"
        )
    return tuple(changes)
