"""Pushes to one partition that wait for their turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

from membank.wire.records import Gradient, Update, UpdateResult

_BATCH_BYTES = 64 << 20
"""Gradients that are journalled by one write, at most; one push alone may have more."""


@dataclass(slots=True, eq=False)
class Call:
    """One push to a partition, on its way. Attempts of the same update are different calls."""

    update: Update
    """The update."""
    gradients: Sequence[Gradient]
    """Those of its gradients that belong to the partition."""
    results: tuple[UpdateResult, ...] | None = None
    """What is answered; None = not yet."""
    is_repeat: bool = False
    """Whether the update had been applied before."""
    error: Exception | None = None
    """Why it failed; None = it did not."""

    @property
    def is_done(self) -> bool:
        """Whether the answer is there."""
        return self.results is not None or self.error is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of its gradients."""
        return sum(gradient.values.nbytes for gradient in self.gradients)


class PushQueue:
    """The calls that wait, in the order of their coming. Safe to use from threads."""

    # `_lock` is held for moments only: a push must be able to join while another one holds the
    # partition's `writer` and journals, or nothing would be left to journal together.

    def __init__(self) -> None:
        self._lock = Lock()
        self._calls: deque[Call] = deque()

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call) -> None:
        """Let `call` wait behind the others."""
        with self._lock:
            self._calls.append(call)

    def remove(self, call: Call) -> None:
        """Take out a call that gives up; it must be waiting."""
        with self._lock:
            self._calls.remove(call)

    def next_batch(self) -> list[Call]:
        """Take out the first call and as many after it as are journalled by one write."""
        with self._lock:
            calls = [self._calls.popleft()]
            num_bytes = calls[0].num_bytes
            while self._calls and num_bytes + self._calls[0].num_bytes <= _BATCH_BYTES:
                calls.append(self._calls.popleft())
                num_bytes += calls[-1].num_bytes
            return calls
