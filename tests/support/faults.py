"""Faults that wrappers inject into calls, scripted per method."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from enum import Enum, auto


class Fault(Enum):
    """What goes wrong with one call."""

    UNAVAILABLE = auto()
    """Refused before anything was done."""
    NOT_OWNER = auto()
    """Refused by a shard that does not own the block any more."""
    OVERLOADED = auto()
    """Refused with the hint to come again."""
    DROP_RESPONSE = auto()
    """Done, but the answer is lost."""
    SLOW = auto()
    """Not answered within the deadline."""
    CUT = auto()
    """The stream of the answer breaks in the middle."""
    SHORT = auto()
    """The stream of the answer ends early, as if it were whole."""
    WRONG_CRC = auto()
    """A bit of the answer is flipped."""
    INTERNAL = auto()
    """The service has a defect."""


class FaultScript:
    """The faults of the calls to come, by method; calls beyond the script succeed.

    Also counts calls and keeps the request ids that arrived. Safe to use from threads.
    """

    def __init__(self) -> None:
        self._faults: dict[str, deque[Fault | None]] = {}
        self._called = threading.Condition()
        self.calls: list[str] = []
        self.request_ids: list[str] = []
        self.refs: list[tuple[object, ...]] = []
        self.metadata: list[dict[str, str]] = []
        self.spoil_part: Callable[[int, bytes], bytes] = lambda number, payload: payload
        """Returns what is sent as a part of a fetch that goes layer by layer; may wait or raise."""

    def plan(self, method: str, *faults: Fault | None) -> None:
        """Say what happens to the next calls of `method`; None = nothing."""
        self._faults[method] = deque(faults)

    def take(self, method: str) -> Fault | None:
        """Note a call, and return what happens to it."""
        with self._called:
            self.calls.append(method)
            self._called.notify_all()
            planned = self._faults.get(method)
            return planned.popleft() if planned else None

    def num_calls(self, method: str) -> int:
        """Return the number of calls of `method`."""
        return self.calls.count(method)

    async def wait_for(self, method: str, count: int = 1) -> None:
        """Wait until `method` was called `count` times in all."""
        await asyncio.to_thread(self._wait_for, method, count)

    def _wait_for(self, method: str, count: int) -> None:
        with self._called:
            if not self._called.wait_for(lambda: self.num_calls(method) >= count, timeout=10):
                raise TimeoutError(f"{method} was called {self.num_calls(method)} times")
