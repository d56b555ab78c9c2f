"""The right of an owner to answer: until when nobody else can have taken its partition over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

MARGIN = 1.1
"""How much longer a new owner waits than a lease lasts: clocks may differ in speed by a tenth."""


def boot_clock() -> float:
    """Return seconds since this machine started, the time it slept included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """Says whether an owner may acknowledge and serve, by asking the storage often enough.

    An owner asks whether somebody else has published a manifest. If nobody had when it asked,
    it may answer until `duration_s` after that moment: whoever takes over publishes first and then
    waits that long. So an owner that was paused, or cut off from the storage, asks again before
    it says another word.

    Parameters
    ----------
    duration_s
        Length of the lease, in seconds; infinity = the storage never has to be asked, because a
        lock proves that there is no other owner.
    ask
        Asks the storage; raises `UnavailableError` (FENCED) if there is another owner.
    clock
        Seconds; must count while the machine sleeps.
    """

    # `_until` is one float, replaced whole; two threads that ask at once do no harm.

    def __init__(
        self, duration_s: float, ask: Callable[[], None], clock: Callable[[], float]
    ) -> None:
        self._duration_s = duration_s
        self._ask = ask
        self._clock = clock
        self._until = math.inf if math.isinf(duration_s) else -math.inf

    def renew(self) -> None:
        """Ask now.

        Raises
        ------
        UnavailableError
            If there is another owner (FENCED), or the storage does not answer.
        """
        if math.isinf(self._duration_s):
            return
        # Before the question: the answer is true of some moment after it.
        asked_at = self._clock()
        self._ask()
        self._until = max(self._until, asked_at + self._duration_s)

    def require(self) -> None:
        """Return if the owner may answer; ask first where the last answer is too old.

        Raises
        ------
        UnavailableError
            As for `renew`.
        """
        if self._clock() >= self._until:
            self.renew()
