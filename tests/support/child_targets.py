"""Functions for processes of their own: a spawned process imports them by name."""

from __future__ import annotations

from multiprocessing.connection import Connection

from membank.wire.errors import NotFoundError


def refuse(task: str, pipe: Connection) -> None:
    """Fail with an error that says `task`."""
    raise NotFoundError(task)


def die(task: str, pipe: Connection) -> None:
    """End without a word."""
    raise SystemExit(int(task))


def wait(task: str, pipe: Connection) -> None:
    """Do nothing until the other end is closed."""
    pipe.recv()
