"""The process that is killed, as its parent sees it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess

from campaign_bank import ArmKill
from campaign_clients import PATIENCE_S, ServiceGone, ServiceHangs
from campaign_worker import Setting, serve


class Service:
    """A running worker, as its parent sees it.

    Parameters
    ----------
    context
        Starts processes.
    setting
        Which bank.
    num_clients
        Connections to make.
    kill
        When the worker is to kill itself, counted from its start; None = never.
    """

    def __init__(
        self,
        context: ForkServerContext,
        setting: Setting,
        num_clients: int,
        kill: ArmKill | None = None,
    ) -> None:
        pipes = [context.Pipe() for _ in range(num_clients + 1)]
        self.control: Connection = pipes[0][0]
        self.connections: list[Connection] = [ours for ours, _ in pipes[1:]]
        theirs = [end for _, end in pipes]
        self.process: ForkServerProcess = context.Process(
            target=serve, args=(setting, theirs[0], theirs[1:], kill), daemon=True
        )
        self.process.start()
        for end in theirs:
            end.close()

    def wait_until_open(self) -> None:
        """Return once the bank is open, or raise why it is not."""
        try:
            if not self.control.poll(PATIENCE_S):
                raise ServiceHangs(f"the bank is not open after {PATIENCE_S:.0f} s")
            answer = self.control.recv()
        except (EOFError, ConnectionError) as err:
            raise ServiceGone from err
        if isinstance(answer, Exception):
            raise answer

    def show_stacks(self) -> None:
        """Let a worker that hangs write to its log where."""
        if self.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGUSR1)
            self.process.join(1.0)

    def end(self) -> int:
        """Kill the worker if it lives, and return how it ended."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        for connection in (self.control, *self.connections):
            connection.close()
        assert self.process.exitcode is not None
        return self.process.exitcode


def preloaded_context() -> ForkServerContext:
    """Return a context whose server has imported everything and opened nothing."""
    # A store that was opened before a fork hangs after it; torch takes seconds to import.
    context = multiprocessing.get_context("forkserver")
    # The server does not know the path of the tests' own modules; these bring all that is slow.
    context.set_forkserver_preload(
        ["membank.bank_service.shard.shard", "membank.bank_service.knowledge"]
    )
    return context
