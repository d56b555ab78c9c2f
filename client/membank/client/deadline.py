"""One deadline for a call and everything that it does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from membank.wire.errors import DeadlineError, InvalidArgumentError, Reason

_LONGEST_S = 1e8
"""Some three years: more than any call takes, and less than a clock of the system can count."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in time that the attempts, waits and refreshes of one call share."""

    timeout_s: float
    """What the caller allowed, in seconds."""
    at_s: float
    """When it ends, on `clock`."""
    clock: Callable[[], float] = time.monotonic
    """Tells the time in seconds."""

    @classmethod
    def after(cls, timeout_s: float, *, clock: Callable[[], float] = time.monotonic) -> Deadline:
        """Return the deadline `timeout_s` seconds from now, or 1e8 if that is more.

        Raises
        ------
        InvalidArgumentError
            If it is not finite and positive.
        """
        if not 0 < timeout_s < math.inf:
            raise InvalidArgumentError(
                f"timeout_s is {timeout_s!r}; accepted: finite, > 0", reason=Reason.BAD_CONFIG
            )
        return cls(timeout_s, clock() + min(timeout_s, _LONGEST_S), clock)

    def left_s(self) -> float:
        """Return the seconds that are left, <= 0 where it has passed."""
        return self.at_s - self.clock()

    def remaining_s(self, what: str) -> float:
        """Return the seconds that are left for `what`.

        Raises
        ------
        DeadlineError
            If there are none.
        """
        left = self.left_s()
        if left <= 0:
            raise DeadlineError(
                f"{what}: the deadline of {self.timeout_s:g} s has passed; a change may or may "
                "not have happened",
                metadata={"timeout_s": f"{self.timeout_s:g}"},
            )
        return left
