"""Exit codes, and how an error reaches the user: one line, no traceback."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable

from rich.markup import escape

from membank.cli.output import err_console
from membank.wire.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    ConflictError,
    CorruptionError,
    DeadlineError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    MembankError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)

EXIT_CODES: dict[type[MembankError], int] = {
    InvalidArgumentError: 2,
    NotFoundError: 3,
    AlreadyExistsError: 4,
    FailedPreconditionError: 4,
    ConflictError: 5,
    UnauthenticatedError: 6,
    AccessDeniedError: 6,
    UnavailableError: 7,
    DeadlineError: 7,
    ResourceExhaustedError: 8,
    CorruptionError: 9,
    InternalError: 70,
}
"""Exit code of each leaf of the error tree; 2 is also click's for bad usage."""


def run(app: Callable[[], object]) -> None:
    """Run a typer app and end the process with the code of its outcome.

    Typer itself reports wrong usage (2) and an interrupt (130).
    """
    try:
        app()
    except MembankError as err:
        report(err)
        raise SystemExit(EXIT_CODES[type(err)]) from None
    except BrokenPipeError:
        # The reader of our output (head, less) is gone; that is its decision, not a failure.
        sys.stderr.close()
        raise SystemExit(0) from None
    except OSError as err:
        # A file of the user's: a run that may not be written, a disk that is full.
        failed = _file_failed(err)
        report(failed)
        raise SystemExit(EXIT_CODES[type(failed)]) from None


def _file_failed(err: OSError) -> MembankError:
    what = f"{err.filename}: " if err.filename else ""
    words = f"{what}{err.strerror or err}; mend that, then give the command again"
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhaustedError(words, reason=Reason.NO_SPACE)
    return FailedPreconditionError(words, reason=Reason.STORE_FAILED)


def report(err: MembankError) -> None:
    """Print an error: as JSON on standard error where the caller asked for JSON."""
    if "--json" in sys.argv:
        document = {"error": str(err), "reason": err.reason.value, **err.metadata}
        sys.stderr.write(json.dumps(document) + "\n")
    else:
        err_console.print(f"[bold red]error[/]: {escape(str(err))} [dim]({err.reason.value})[/]")
