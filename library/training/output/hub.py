"""Uploads to the Hugging Face hub, and states from there.

Torch-free, and the hub's package is imported only where it is used: most runs upload nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from glob import escape
from pathlib import Path

from library.core.errors import CheckpointError, ConfigError
from library.core.files import explain, hold, let_go
from library.core.log import logger
from library.options.hub import HubFolder, HubOptions
from library.options.state import LATEST, StateOptions

_log = logger("hub")

_LOOK_SECONDS = 0.2  # between two looks at whether somebody is in a hurry


class Uploads:
    """Uploads files and folders one after the other, in a thread of their own.

    Whatever goes wrong with an upload costs a warning: the files are safe in --output_dir.
    """

    def __init__(
        self,
        options: HubOptions,
        endpoint: str | None = None,
        *,
        hurried: Callable[[], bool] = lambda: False,
    ) -> None:
        """`endpoint`: address of the hub, for a mirror; None for the usual one. `hurried`: whether nobody has
        time to wait for an upload any more; it then goes on in the background, and ends before the program.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        assert options.huggingface_repo_id is not None
        disable_progress_bars()  # they would break into the line of the run's own progress
        self._options = options
        self._hurried = hurried
        self._repo_id = options.huggingface_repo_id
        self._api = HfApi(endpoint=endpoint, token=options.huggingface_token)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub")
        self._has_repo = False
        self._do(f"the repository {self._repo_id} on the hub could not be made or reached", self._make_repo)

    def files(self, paths: Sequence[Path]) -> None:
        """Upload files into the folder of the repository."""
        for path in paths:
            self._upload(path, lambda held, **where: self._api.upload_file(path_or_fileobj=held, **where))

    def folder(self, path: Path) -> None:
        """Upload a folder, in one commit: all of it arrives, or nothing."""
        self._upload(path, lambda held, **where: self._api.upload_folder(folder_path=held, **where))

    def close(self) -> None:
        """Wait for what is still being uploaded."""
        self._thread.shutdown(wait=True)

    def _upload(self, path: Path, send: Callable[..., object]) -> None:
        """Let the thread `send` what is at `path` now, from the disk: a model's file is large."""
        try:
            held = hold(path)  # until it is sent it may be replaced, or removed as an older save
        except OSError as error:
            _log.warning("%s was not uploaded: %s", path, explain(error))
            return

        def upload() -> None:
            try:
                self._make_repo()
                repository = {"repo_id": self._repo_id, "repo_type": self._options.huggingface_repo_type}
                send(held, path_in_repo=self._place(path.name), **repository)
            finally:
                let_go(held)
            _log.info("uploaded %s to %s", path.name, self._repo_id)

        self._do(f"{path} was not uploaded", upload)

    def _make_repo(self) -> None:
        if not self._has_repo:
            self._api.create_repo(
                self._repo_id,
                repo_type=self._options.huggingface_repo_type,
                private=self._options.huggingface_repo_visibility == "private",
                exist_ok=True,
            )
            self._has_repo = True

    def _place(self, name: str) -> str:
        folder = self._options.huggingface_path_in_repo.strip("/")
        return f"{folder}/{name}" if folder else name

    def _do(self, failure: str, action: Callable[[], None]) -> None:
        """Let the thread do it; wait unless --async_upload or in a hurry. `failure` begins the warning."""

        def report(done: Future[None]) -> None:
            error = done.exception()
            if error is not None:
                _log.warning("%s: %s", failure, _shortly(error))

        task = self._thread.submit(action)
        while not (self._options.async_upload or task.done() or self._hurried()):
            wait([task], timeout=_LOOK_SECONDS)
        task.add_done_callback(report)  # at once, if it is done


def check_uploads(hub: HubOptions, state: StateOptions) -> None:
    """Raise ConfigError for flags of the two groups that do not go together."""
    if hub.resume_from_huggingface and state.resume in (None, LATEST):
        raise ConfigError(
            "--resume_from_huggingface needs the place of the state: --resume owner/name/folder. Its name on "
            "the hub is the one it has in --output_dir."
        )


def fetch_state(hub: HubOptions, state: StateOptions, endpoint: str | None = None) -> StateOptions:
    """Return the options with `--resume` naming a local folder, downloaded with --resume_from_huggingface.

    Raises:
        ConfigError: `--resume` does not name a folder on the hub.
        CheckpointError: it cannot be downloaded.
    """
    if not hub.resume_from_huggingface or state.resume is None:
        return state
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    place = HubFolder.parse(state.resume)
    try:
        snapshot = HfApi(endpoint=endpoint, token=hub.huggingface_token).snapshot_download(
            place.repo_id,
            repo_type=place.repo_type,
            revision=place.revision,
            allow_patterns=f"{escape(place.path)}/*",
        )
    except (OSError, HTTPError) as error:
        raise CheckpointError(
            f"--resume {state.resume} cannot be downloaded from the hub: {_shortly(error)}"
        ) from error
    folder = Path(snapshot) / place.path
    if not folder.is_dir():
        raise CheckpointError(f"--resume {state.resume}: {place.repo_id} has no folder '{place.path}'.")
    return replace(state, resume=str(folder))


def _shortly(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
