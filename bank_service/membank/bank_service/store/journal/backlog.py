"""What was appended and not shipped yet: how much, and since when."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from threading import Lock

_MAX_ENTRIES = 1024


@dataclass(frozen=True, slots=True)
class _Entry:
    last_lsn: int
    num_bytes: int
    since: float


class Backlog:
    """Counts bytes by LSN, in bounded memory. Safe to use from threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._entries: deque[_Entry] = deque()

    @property
    def since(self) -> float | None:
        """When the oldest of it was added, at the earliest; None = there is none."""
        with self._lock:
            return self._entries[0].since if self._entries else None

    @property
    def num_bytes(self) -> int:
        """Its bytes, at most."""
        with self._lock:
            return sum(entry.num_bytes for entry in self._entries)

    def add(self, last_lsn: int, num_bytes: int, since: float) -> None:
        """Take note of frames up to `last_lsn`, later than all before."""
        with self._lock:
            self._entries.append(_Entry(last_lsn, num_bytes, since))
            if len(self._entries) > _MAX_ENTRIES:
                self._merge()

    def forget(self, lsn: int) -> None:
        """Leave out what is complete with `lsn`."""
        with self._lock:
            while self._entries and self._entries[0].last_lsn <= lsn:
                self._entries.popleft()

    def _merge(self) -> None:
        # Two by two: coarser, and never less than there is.
        pairs = zip(*[iter(self._entries)] * 2, strict=False)
        rest = [self._entries[-1]] if len(self._entries) % 2 else []
        merged = [_Entry(b.last_lsn, a.num_bytes + b.num_bytes, a.since) for a, b in pairs]
        self._entries = deque([*merged, *rest])
