"""Runs `membank` commands in this process."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass

from membank.cli.app import app, register_commands
from membank.cli.exits import run

if not app.registered_commands:
    register_commands()


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def membank(*args: str) -> Ended:
    """Run ``membank ARGS`` as the console script would."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["membank", *args]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(app)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else -1
        return Ended(code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = before
    raise AssertionError("a command ends the process")
