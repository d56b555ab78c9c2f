"""A bound on the bytes that requests hold in memory at one time."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from membank.wire.errors import InvalidArgumentError, Reason, ResourceExhaustedError

RETRY_AFTER_MS = 50
"""Hint given with a refusal: about the time in which one in-flight path of tens of MB is sent."""


class ByteBudget:
    """Counts bytes in flight and refuses what would exceed the bound.

    Refusing beats queueing here: a queue of large requests is itself the memory that the bound is
    meant to save, and the client knows best whether it still wants the answer later.

    Parameters
    ----------
    limit_bytes
        Most bytes in flight, > 0.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Bytes in flight now."""
        return self._used_bytes

    def reserve(self, num_bytes: int, *, what: str) -> Reservation:
        """Take `num_bytes`, to be released by leaving the returned context.

        Parameters
        ----------
        num_bytes
            Bytes that the request will hold, >= 0.
        what
            Name of the request, for the error.

        Returns
        -------
        Reservation
            The bytes taken.

        Raises
        ------
        InvalidArgumentError
            If the request alone exceeds the bound; smaller requests would pass.
        ResourceExhaustedError
            If others hold the bytes now; metadata ``retry_after_ms`` says when to come again.
        """
        reservation = Reservation(self, what)
        reservation.grow(num_bytes)
        return reservation

    def _take(self, num_bytes: int, held: int, what: str) -> None:
        if held + num_bytes > self._limit_bytes:
            raise InvalidArgumentError(
                f"{what} holds {held + num_bytes} bytes, more than the {self._limit_bytes} that "
                "all requests may hold together; ask for fewer blocks at a time",
                reason=Reason.MESSAGE_TOO_LARGE,
                metadata={"max_bytes": str(self._limit_bytes)},
            )
        with self._lock:
            if self._used_bytes + num_bytes > self._limit_bytes:
                raise ResourceExhaustedError(
                    f"{what}: {self._used_bytes} bytes are in flight and {num_bytes} more would "
                    f"exceed {self._limit_bytes}; retry in {RETRY_AFTER_MS} ms",
                    reason=Reason.OVERLOADED,
                    metadata={"retry_after_ms": str(RETRY_AFTER_MS)},
                )
            self._used_bytes += num_bytes

    def _give_back(self, num_bytes: int) -> None:
        with self._lock:
            self._used_bytes -= num_bytes


class Reservation:
    """Bytes taken from a `ByteBudget`; made by `ByteBudget.reserve`."""

    def __init__(self, budget: ByteBudget, what: str) -> None:
        self._budget = budget
        self._what = what
        self._held_bytes = 0

    def grow(self, num_bytes: int) -> None:
        """Take `num_bytes` more; errors as of `ByteBudget.reserve`."""
        self._budget._take(num_bytes, self._held_bytes, self._what)
        self._held_bytes += num_bytes

    def resize(self, num_bytes: int) -> None:
        """Hold exactly `num_bytes` from now on; errors as of `ByteBudget.reserve`."""
        if num_bytes > self._held_bytes:
            self.grow(num_bytes - self._held_bytes)
        else:
            self.shrink_to(num_bytes)

    def shrink_to(self, num_bytes: int) -> None:
        """Give back all but `num_bytes`."""
        excess = max(0, self._held_bytes - num_bytes)
        self._held_bytes -= excess
        self._budget._give_back(excess)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shrink_to(0)
