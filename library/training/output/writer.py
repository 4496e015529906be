"""Where what was trained goes: files, and the hub where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from library.training.context import RunContext
from library.training.events import Moment
from library.training.optim.optimizer import describe_optimizer
from library.training.output.ema import Ema
from library.training.output.hub import Uploads
from library.training.output.metadata import TrainingFacts
from library.training.output.saving import PeriodicSave
from library.training.trainee.kind import Trainee
from library.training.trainee.learner import Learner


class Output:
    """Writes what is trained, and its average, and uploads what the options say. For the main process."""

    def __init__(
        self,
        context: RunContext,
        trainee: Trainee,
        learner: Learner,
        ema: Ema | None,
        hurried: Callable[[], bool],
    ) -> None:
        """`hurried`: whether the run should stop, so that nothing waits for an upload any more."""
        options = context.options
        facts = _facts(context, trainee, learner)
        self._file = context.trainer.trainee_kind.file(trainee, learner, context, facts, ema)
        self._hub = options.hub
        uploading = options.hub.huggingface_repo_id is not None and context.processes.is_main
        self._uploads = Uploads(options.hub, hurried=hurried) if uploading else None
        self.periodic_save = PeriodicSave(options.saving, self.write, total_epochs=context.total_epochs)

    def write(self, path: Path, moment: Moment) -> list[Path]:
        """Write what is trained as it is now; return the files. Raises StorageError."""
        files = self._file.write(path, moment)
        if self._uploads is not None:
            self._uploads.files([path for path in files if not path.is_dir()])
            for folder in filter(Path.is_dir, files):
                self._uploads.folder(folder)
        return files

    def take_states(self, folders: Sequence[Path]) -> None:
        """Upload states that were just saved, if that is asked for."""
        if self._uploads is not None and self._hub.save_state_to_huggingface:
            for folder in folders:
                self._uploads.folder(folder)

    def close(self) -> None:
        """Wait for what is still being uploaded."""
        if self._uploads is not None:
            self._uploads.close()


def _facts(context: RunContext, trainee: Trainee, learner: Learner) -> TrainingFacts:
    options, prepared = context.options, context.prepared
    sizes = context.trainer.trainee_kind.found_sizes(options, trainee)
    return TrainingFacts(
        family=context.trainer.family,
        described={**prepared.files.described, **sizes},
        manifest=prepared.manifest,
        trainee=options.trainee,
        metadata=options.metadata,
        recorded=context.trainer.recorded_options(),
        output_name=options.saving.output_name,
        optimizer=describe_optimizer(learner.optimizer, options.optimizer),
        seed=context.seed,
        session_id=context.session_id,
        started_at=context.started_at,
        total_steps=context.total_steps,
        total_epochs=context.total_epochs,
        batches_per_epoch=context.plan.batches_per_epoch,
    )
