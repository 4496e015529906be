"""How every script ends: a user's mistake is one sentence and an exit code, never a traceback."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable

from library.core.errors import Stopped, UserError

_HEARING_SECONDS = 3.0


def run_script(main: Callable[[], None]) -> None:
    """Run `main`; print a UserError as `error: ...` on stderr and exit with its code.

    A run that was asked to stop says so and exits with 75. Ctrl-C elsewhere exits with 130.
    """
    try:
        main()
    except (UserError, Stopped) as error:
        text, code = describe(error)
        _let_the_first_speak()
        print(text, file=sys.stderr)
        sys.exit(code)
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        sys.exit(130)


def describe(error: BaseException) -> tuple[str, int]:
    """Return what is printed of an error that ends the program, and the exit code."""
    if isinstance(error, UserError):
        return f"error: {error}", error.exit_code
    if isinstance(error, Stopped):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "stopped by the keyboard", 130
    if isinstance(error, SystemExit):
        return "", error.code if isinstance(error.code, int) else 1
    return "".join(traceback.format_exception(error)).rstrip(), 1


def _let_the_first_speak() -> None:
    """Wait in all processes of a computer but the first.

    A mistake in the options or the data is met by all alike. The launcher ends the others when the first one
    has ended, so it is told once; what only one of them meets is told all the same, a little later.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_HEARING_SECONDS)
