"""The errors a user can meet. Each has an exit code and is shown as a sentence, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A condition the user can mend. The message names the value, the file and the way out."""

    exit_code = 2


class ConfigError(UserError):
    """A mistake in a flag, a configuration file or a dataset TOML."""


class CheckpointError(UserError):
    """A weight file that is missing, truncated, foreign or does not fit the model."""


class DataError(UserError):
    """A picture, caption, mask or cache entry that cannot be used."""


class MissingPackageError(UserError):
    """An optional package that a chosen option needs is not installed."""

    def __init__(self, package: str, needed_for: str, install: str | None = None) -> None:
        super().__init__(
            f"{needed_for} needs the package '{package}': run `pip install {install or package}`."
        )


class NonFiniteError(UserError):
    """A NaN or infinity in latents, text, loss or gradient."""

    exit_code = 70


class ResourceError(UserError):
    """Memory or another resource of the machine is exhausted."""

    exit_code = 71


class StorageError(UserError):
    """A file could not be written (disk full, no permission while running)."""

    exit_code = 74


class Stopped(BaseException):
    """The run was asked to stop and left everything in order; the same command with --resume goes on.

    Not an error, and like KeyboardInterrupt not an Exception, so that nothing on the way mistakes it for a
    failure and carries on.
    """

    exit_code = 75
