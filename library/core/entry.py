"""How every script ends: a user's mistake is one sentence and an exit code, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from library.core.errors import Stopped, UserError


def run_script(main: Callable[[], None]) -> None:
    """Run `main`; print a UserError as `error: ...` on stderr and exit with its code.

    A run that was asked to stop says so and exits with 75. Ctrl-C elsewhere exits with 130.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        sys.exit(130)
