"""Counting what became of calls, which come from the loop's thread and from those of callers."""

from __future__ import annotations

import threading
from collections import Counter


class CallCounter:
    """Counts calls by name; safe for threads."""

    # `_lock` guards `_counts`.

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def count(self, what: str) -> None:
        """Count one call."""
        with self._lock:
            self._counts[what] += 1

    def counts(self) -> dict[str, int]:
        """Return how often each name was counted, in a dictionary of the caller's own."""
        with self._lock:
            return dict(self._counts)
