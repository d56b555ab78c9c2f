"""The port for data that an endpoint has told of: whether to go there."""

from __future__ import annotations

import threading
import time

from membank.wire.alternative import Alternative

_PAUSE_S = 60.0
"""Time in which nobody tries a port again that could not be reached: each try may cost a call
`CONNECT_TIMEOUT_S`."""
CONNECT_TIMEOUT_S = 1.0


class DataPort:
    """What is known of an endpoint's port for data; safe for threads."""

    # `_lock` guards everything.

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: Alternative | None = None
        self._paused_until = 0.0
        self._num_failures = 0
        self._num_served = 0

    @property
    def num_served(self) -> int:
        """Calls that it has served."""
        return self._num_served

    @property
    def num_failures(self) -> int:
        """How often it was given up for a while."""
        return self._num_failures

    def wanted(self) -> Alternative | None:
        """Return where new connections are to go; None = to the endpoint itself."""
        with self._lock:
            return None if time.monotonic() < self._paused_until else self._told

    def told(self, alternative: Alternative) -> None:
        """Take what the endpoint says; that it is elsewhere, or another server, ends a pause."""
        with self._lock:
            if alternative != self._told:
                self._told, self._paused_until = alternative, 0.0

    def served(self) -> None:
        """Count a call."""
        with self._lock:
            self._num_served += 1

    def failed(self, alternative: Alternative) -> None:
        """Give it up for a while: it cannot be reached, breaks, or is another server's."""
        with self._lock:
            self._num_failures += 1
            if alternative == self._told:
                self._paused_until = time.monotonic() + _PAUSE_S
