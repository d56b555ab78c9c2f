"""A process that works for this one, and ends with it."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TypeVar

from membank.wire.errors import DeadlineError, InternalError, MembankError

T = TypeVar("T")


class Child:
    """Runs a function in a process of its own, and talks to it.

    Parameters
    ----------
    name
        What it is called in errors.
    target
        Function of a module, called with `task` and its end of a pipe. A `MembankError` that it
        raises is raised by `receive` here; it ends when the pipe does (EOFError).
    task
        What it works on; pickled.
    """

    def __init__(self, name: str, target: Callable[[T, Connection], None], task: T) -> None:
        self.name = name
        # Spawned: a forked copy of gRPC's threads and locks does not work.
        context = multiprocessing.get_context("spawn")
        self.pipe, far_end = context.Pipe()
        self._process = context.Process(
            target=_run, args=(target, task, far_end), name=name, daemon=True
        )
        self._process.start()
        # With no copy here, the end of the process is the end of the pipe.
        far_end.close()

    @property
    def pid(self) -> int:
        """Number of the process."""
        pid = self._process.pid
        assert pid is not None
        return pid

    def send(self, message: object) -> None:
        """Send `message`; a child that is gone is noticed by `receive`."""
        with suppress(OSError):
            self.pipe.send(message)

    def receive(self, timeout_s: float) -> object:
        """Return the next message.

        Raises
        ------
        MembankError
            What the child failed with.
        DeadlineError
            If nothing came in time.
        InternalError
            If the child died; it has printed why, if it could.
        """
        if not self.pipe.poll(timeout_s):
            raise DeadlineError(
                f"{self.name} (process {self.pid}) said nothing for {timeout_s:g} s"
            )
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(5.0)
            raise InternalError(
                f"{self.name} (process {self.pid}) died, exit code {self._process.exitcode}; "
                "what it printed says why, and memory may have run out"
            ) from None
        if isinstance(message, MembankError):
            raise message
        return message

    def let_go(self) -> None:
        """Tell the child to end, without waiting for it."""
        self.pipe.close()

    def end(self, timeout_s: float) -> None:
        """Wait until the child has ended; kill it after `timeout_s`."""
        self.pipe.close()
        self._process.join(timeout_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _run(target: Callable[[T, Connection], None], task: T, pipe: Connection) -> None:
    # An interrupt goes to the whole group; the parent ends its children in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that is gone closes the pipe.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            target(task, pipe)
        except MembankError as err:
            pipe.send(err)
