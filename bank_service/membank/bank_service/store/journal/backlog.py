"""Since when there is something that was appended and not shipped yet."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from threading import Lock

_MAX_ENTRIES = 1024


@dataclass(frozen=True, slots=True)
class _Entry:
    last_lsn: int
    since: float
    num_added: int

    def joined(self, later: _Entry) -> _Entry:
        return _Entry(later.last_lsn, self.since, self.num_added + later.num_added)


class Backlog:
    """Knows the times of additions by LSN, in bounded memory. Safe to use from threads.

    What is told is exact until there are many entries; then it is coarser, and never too late.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._entries: deque[_Entry] = deque()
        self._grain = 1
        """How many additions an entry stands for, at least, but for the last one."""

    @property
    def since(self) -> float | None:
        """When the oldest of it was added, at the earliest; None = there is none."""
        with self._lock:
            return self._entries[0].since if self._entries else None

    def add(self, last_lsn: int, since: float) -> None:
        """Take note of frames up to `last_lsn`, later than all before."""
        entry = _Entry(last_lsn, since, 1)
        with self._lock:
            if self._entries and self._entries[-1].num_added < self._grain:
                entry = self._entries.pop().joined(entry)
            self._entries.append(entry)
            if len(self._entries) > _MAX_ENTRIES:
                self._grain *= 2
                self._join_pairs()

    def forget(self, lsn: int) -> None:
        """Leave out what is complete with `lsn`."""
        with self._lock:
            while self._entries and self._entries[0].last_lsn <= lsn:
                self._entries.popleft()
            if not self._entries:
                self._grain = 1

    def _join_pairs(self) -> None:
        entries = list(self._entries)
        pairs = zip(entries[::2], entries[1::2], strict=False)
        rest = entries[-1:] if len(entries) % 2 else []
        self._entries = deque([*(first.joined(second) for first, second in pairs), *rest])
