"""A board that outlives the process that writes on it: what each of its threads was at."""

from __future__ import annotations

import mmap
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from campaign_bank import Phase
from membank.bank_service.shard.maintenance import Consolidates, Maintenance
from storage_faults import FaultPlan

_NUM_SEATS = 64
_NUM_BYTES = 4096


class Board:
    """One byte per thread in a file that several processes map, and room for a last word.

    Parameters
    ----------
    path
        The file; made if missing.
    """

    def __init__(self, path: Path) -> None:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        os.ftruncate(handle, _NUM_BYTES)
        self._map = mmap.mmap(handle, _NUM_BYTES)
        os.close(handle)
        self._lock = threading.Lock()
        self._num_seats = 0
        self._mine = threading.local()

    def clear(self) -> None:
        """Wipe it, before a process begins."""
        self._map[:] = bytes(_NUM_BYTES)

    @contextmanager
    def at(self, phase: Phase) -> Iterator[None]:
        """Show that this thread is at `phase`."""
        seat = self._seat()
        before, self._map[seat] = self._map[seat], phase
        try:
            yield
        finally:
            self._map[seat] = before

    def note(self, text: str) -> None:
        """Leave a last word."""
        data = text.encode()[: _NUM_BYTES - _NUM_SEATS]
        self._map[_NUM_SEATS : _NUM_SEATS + len(data)] = data

    def phases(self) -> set[Phase]:
        """Return what the threads are, or were, at."""
        return {Phase(code) for code in self._map[:_NUM_SEATS]} - {Phase.IDLE}

    def last_word(self) -> str:
        """Return what was noted; "" = nothing."""
        return self._map[_NUM_SEATS:].rstrip(b"\0").decode(errors="replace")

    def _seat(self) -> int:
        seat: int | None = getattr(self._mine, "seat", None)
        if seat is None:
            with self._lock:
                # Threads that came after so many others share the last seat.
                seat = min(self._num_seats, _NUM_SEATS - 1)
                self._num_seats += 1
            self._mine.seat = seat
        return seat


class ArmedKill(FaultPlan):
    """Sends SIGKILL to this very process at a mutating call of the storage, once it is armed.

    Parameters
    ----------
    board
        Gets the call as a last word.
    """

    def __init__(self, board: Board) -> None:
        super().__init__()
        self._board = board
        self._counting = threading.Lock()
        self._left: int | None = None
        self._after = False

    def arm(self, calls: int, after: bool) -> None:
        """Die at the mutating call that comes after `calls` others, in its middle or after it."""
        with self._counting:
            self._left, self._after = calls, after

    def run(
        self, call: Callable[[], None], *, half: Callable[[], None] | None = None, what: str
    ) -> None:
        # docstring inherited
        if not self._is_now():
            call()
            return
        self._board.note(f"{'after' if self._after else 'in'} {what}")
        if self._after:
            call()
        elif half is not None:
            half()
        os.kill(os.getpid(), signal.SIGKILL)

    def _is_now(self) -> bool:
        with self._counting:
            if self._left is None:
                return False
            self._left -= 1
            return self._left < 0


class ShownMaintenance:
    """A `Maintenance` that shows on a board when it consolidates.

    Parameters
    ----------
    inner
        Does the work.
    board
        The board.
    """

    def __init__(self, inner: Maintenance, board: Board) -> None:
        self._inner = inner
        self._board = board

    def request(self, partition: Consolidates) -> None:
        # docstring inherited
        self._inner.request(_Shown(partition, self._board))

    def every(self, interval_s: float, action: Callable[[], object]) -> None:
        # docstring inherited
        self._inner.every(interval_s, action)

    def close(self) -> None:
        # docstring inherited
        self._inner.close()


class _Shown:
    """A partition whose consolidation shows on a board."""

    def __init__(self, partition: Consolidates, board: Board) -> None:
        self.number = partition.number
        self._partition = partition
        self._board = board

    def try_consolidate(self) -> None:
        # docstring inherited
        with self._board.at(Phase.CONSOLIDATION):
            self._partition.try_consolidate()
