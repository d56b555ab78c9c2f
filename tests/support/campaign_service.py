"""The processes that are killed, as their parent sees them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess

from campaign_bank import ArmKill, Phase
from campaign_board import Board
from campaign_calls import PATIENCE_S, ServiceGone, ServiceHangs
from campaign_setting import Seat, Setting
from campaign_worker import serve


class Process:
    """One process of a service, in all its lives.

    Parameters
    ----------
    context
        Starts processes.
    setting
        The bank.
    seat
        Its part of the bank.
    """

    def __init__(self, context: ForkServerContext, setting: Setting, seat: Seat) -> None:
        self.seat = seat
        self.up = threading.Event()
        """Set while it is open, as far as is known."""
        self.board = Board(setting.board(seat))
        self._context = context
        self._process: ForkServerProcess | None = None
        self._control: Connection | None = None
        self._was_open = False
        self._was_killed = False

    @property
    def running(self) -> ForkServerProcess:
        """The present life."""
        assert self._process is not None
        return self._process

    @property
    def is_at_start(self) -> bool:
        """Whether it is not open yet, or was not when it died."""
        return not self._was_open or Phase.OPENING in self.board.phases()

    @property
    def died_by_itself(self) -> bool:
        """Whether it died before it was killed, and not at a call at which it was to die."""
        return self._is_dead and not self._was_killed and not self.board.last_word()

    @property
    def _is_dead(self) -> bool:
        # Only asked, not polled: two threads that poll a process read its status once.
        return self._process is not None and bool(wait([self._process.sentinel], 0))

    def start(self, setting: Setting, kill: ArmKill | None = None) -> None:
        """Begin a life; `kill` says when it ends itself, counted from its very start."""
        self.board.clear()
        self._was_open = self._was_killed = False
        self._control, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=serve, args=(setting, self.seat, theirs, kill), daemon=True
        )
        self._process.start()
        theirs.close()

    def wait_until_open(self) -> None:
        """Return once it answers calls.

        Raises
        ------
        ServiceGone
            If it dies before.
        ServiceHangs
            If it does not.
        MembankError
            If it says why it does not open.
        """
        assert self._control is not None
        try:
            if not self._control.poll(PATIENCE_S):
                raise ServiceHangs(f"{self.seat} is not open after {PATIENCE_S:.0f} s")
            answer = self._control.recv()
        except (EOFError, OSError) as err:
            raise ServiceGone(self.seat, was_asked=False) from err
        if isinstance(answer, Exception):
            raise answer
        self._was_open = True
        self.up.set()

    def kill(self) -> None:
        """Send SIGKILL."""
        self.up.clear()
        if not self._is_dead:
            self._was_killed = True
            self.running.kill()

    def stop(self) -> None:
        """Let it stop as an operator does."""
        assert self._control is not None
        self.up.clear()
        with suppress(OSError):
            self._control.send("stop")
        self.running.join(PATIENCE_S)

    def end(self) -> int:
        """Make sure that this life is over, and return how it ended; 0 before the first one."""
        self.up.clear()
        if self._process is None or self._control is None:
            return 0
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._control.close()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def show_stacks(self) -> None:
        """Let a process that hangs write to its log where."""
        if self._process is not None and self._process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGUSR1)
            self._process.join(1.0)


def phases_of(processes: Iterable[Process]) -> set[Phase]:
    """Return what the threads of processes are at, or were when they died."""
    return {phase for process in processes for phase in process.board.phases()}


def preloaded_context() -> ForkServerContext:
    """Return a context whose server has imported everything and opened nothing."""
    # A store that was opened before a fork hangs after it; torch takes seconds to import.
    context = multiprocessing.get_context("forkserver")
    # The server does not know the path of the tests' own modules; these bring all that is slow.
    context.set_forkserver_preload(
        ["membank.bank_service.shard.shard", "membank.bank_service.knowledge"]
    )
    return context
